"""Data for training and evaluation: rows of a file become examples, with their audit."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sidepath.data.audit import Audit
from sidepath.data.encode import Dropped, Encoder, pad_id_of, total
from sidepath.data.example import Example
from sidepath.data.holdout import held_out
from sidepath.data.mapped import MappedExamples, MappedWriter
from sidepath.data.pipeline import InMemory, Pipeline, encode_one
from sidepath.data.portions import Portion, portion_of, portions, regrouped, shares
from sidepath.data.rng import derived
from sidepath.data.rows import Schema, Task
from sidepath.data.samples import sample_rows, shown
from sidepath.data.sources import Place, Row, Rows, sources_of
from sidepath.data.survey import Survey, groups, survey
from sidepath.data.transform import Transform, identity_of
from sidepath.errors import DataError


@dataclass(frozen=True, eq=False)
class Data:
    """Tokenised rows of one task.

    A completion is tokenised apart from its prompt, so that generation starts from the very
    tokens training saw: [start] prompt completion [end], with the completion and the end token
    supervised. Of `messages` the assistant's turns are supervised, of plain `text` everything.

    A row longer than `max_tokens` (never more than the tokenizer's own limit) is cut: prompts
    and conversations from the left, keeping the (last) completion whole; plain and labelled
    texts from the right. A row whose completion alone is too long, or empty, is dropped, and so
    is a text without a token. The audit counts each of these.
    """

    name: str
    """The file, or what stands for it in messages."""
    unit: str
    """What `Example.line` counts: "line" or "row"."""
    task: Literal["causal", "classify"]
    schema: Schema
    examples: Sequence[Example]
    """A tuple, or (streamed) a sequence that builds an example when it is asked for."""
    labels: tuple[str, ...]
    """Names of the classes by id; empty for causal data."""
    tokenizer: Any
    max_tokens: int
    rows_read: int
    dropped: Dropped
    parts: tuple[Portion, ...]
    """Which rows come from which source, and how often each is drawn from."""
    weighted: bool = False
    """Weights were given; else every row is seen once an epoch."""
    transform: Transform | None = None
    """What is done to a row each time it is used in training; see `example`."""
    raw: tuple[Row, ...] | None = None
    """The rows before tokenising, beside `examples`; kept for a transform only."""

    def __len__(self) -> int:
        return len(self.examples)

    def place(self, row: int) -> str:
        """Where a row stands in its source, for messages: "a.jsonl, line 7"."""
        part = portion_of(self.parts, row)
        return f"{part.name}, {part.unit} {self.examples[row].line}"

    def example(self, row: int, *, seed: int, epoch: int) -> Example:
        """The example that training uses for a row in an epoch.

        Without a transform `examples[row]`. With one, the row's fields go through it with the
        global random generators (Python, NumPy, torch) seeded from (seed, epoch, row) and
        are tokenised anew; the caller's random state is put back.

        Raises:
            DataError: the transform raises, or gives a row that training cannot use.
        """
        if self.transform is None or self.raw is None:
            return self.examples[row]
        with derived(seed, epoch, row):
            return self._transformed(row, self.raw[row])

    def _transformed(self, row: int, raw: Row) -> Example:
        assert self.transform is not None
        place = self.place(row)
        try:
            fields = self.transform(copy.deepcopy(dict(raw.fields)))
        except Exception as error:
            raise DataError("the transform failed", where=place, found=repr(error)) from error
        encoder = Encoder(self.tokenizer, self.max_tokens)
        try:
            return encode_one(encoder, Row(raw.line, fields), place, self.schema, self.labels)
        except DataError as error:
            raise DataError(
                "the transform gave a row that cannot be used",
                where=place,
                found=error.found,
                expected=error.expected,
                faults=error.faults or [error.what],
            ) from error

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What a resumed run's data must have in common with these, as plain values.

        The examples' digest, the weights (null when none were given), and what `identity_of`
        says of the transform (null without one). What a transform reads from elsewhere is
        not in it.
        """
        weights = [part.weight for part in self.parts] if self.weighted else None
        transform = None
        if self.transform is not None and self.raw is not None:
            transform = identity_of(self.transform, (row.fields for row in self.raw))
        return {"digest": self.digest, "weights": weights, "transform": transform}

    @property
    def pad_id(self) -> int:
        """The token that fills up short rows; masked in any case."""
        return pad_id_of(self.tokenizer)

    @functools.cached_property
    def lengths(self) -> array[int]:
        """Tokens of each example."""
        if isinstance(self.examples, MappedExamples):
            return array("q", self.examples.lengths.tobytes())
        return array("q", (len(example.ids_T) for example in self.examples))

    @functools.cached_property
    def survey(self) -> Survey:
        """What is counted of the examples, in one pass over them."""
        return survey(self.examples, f"{self.task} {self.pad_id} {self.labels}")

    @property
    def largest_id(self) -> int:
        """The largest token id of all examples."""
        return self.survey.largest_id

    @property
    def digest(self) -> str:
        """SHA-256 of everything training sees of the rows, in order."""
        return self.survey.digest

    @functools.cached_property
    def audit(self) -> Audit:
        """What the rows hold; see `Audit`."""
        return _audited(self)

    def require_trainable(self) -> None:
        """Errors: `DataError` where training on these rows teaches nothing, or never to stop."""
        self.audit.require_trainable(ends_expected=self.schema in ("completion", "messages"))

    def prompts(self) -> list[list[int]]:
        """Token ids that generation starts from, one list an example (causal rows)."""
        return [example.ids_T[: example.prompt_length].tolist() for example in self.examples]

    def subset(self, rows: Sequence[int]) -> Data:
        """The examples at these positions, in this order (those of one portion together)."""
        rows, parts = regrouped(self.parts, rows, weighted=self.weighted)
        chosen: Sequence[Example]
        if isinstance(self.examples, MappedExamples):
            chosen = self.examples.chosen(rows)
        else:
            chosen = tuple(self.examples[row] for row in rows)
        raw = None if self.raw is None else tuple(self.raw[row] for row in rows)
        return dataclasses.replace(
            self, examples=chosen, raw=raw, parts=parts, rows_read=len(chosen), dropped=Dropped()
        )

    def split(self, share: float, *, seed: int) -> tuple[Data, Data]:
        """Training rows, and about `share` of each portion's rows held out (at least one).

        Rows with the same prompt (or the same text) stay on one side, so that nothing held out
        was seen in training. The same seed gives the same split.
        """
        digests = b"".join(_family(example, self.schema) for example in self.examples)
        held = held_out(groups(digests), self.parts, share, seed=seed)
        return (
            self.subset(np.flatnonzero(~held).tolist()),
            self.subset(np.flatnonzero(held).tolist()),
        )


def load_data(
    source: Place | Sequence[Place] | Rows,
    tokenizer: Any,
    *,
    weights: Sequence[float] | None = None,
    max_tokens: int = 1024,
    limit: int | None = None,
    task: Task = "auto",
    labels: Sequence[str] | None = None,
    columns: Mapping[str, str] | None = None,
    stream: bool = False,
    transform: Transform | None = None,
) -> Data:
    """Read, check and tokenise rows.

    Rows come from a file (.jsonl, .json, .csv, .tsv, each also .gz; .parquet), from a data set
    on the Hugging Face hub ("hub:owner/name@revision,config=name,split=train", all behind the
    name optional), from several of these in a list, or from a list of mappings. They have one
    schema: `messages` (with `tools`), `prompt` + `completion`, `text` + `label`, or `text`;
    ShareGPT's and Alpaca's forms are made into these. `columns` maps a schema's names to the
    file's: `{"prompt": "mr", "completion": "ref"}`.

    Of several sources, `weights` gives the share of the rows drawn from each in training (they
    are divided by their sum); without, each row is seen once an epoch. `limit` holds for each
    source. With `stream` the examples are kept in memory-mapped files instead of in memory, in
    a temporary folder (TMPDIR says where) that goes with the `Data`. `transform` is called on a
    row's fields each time the row is used in training (`Data.example`), and may draw from the
    global random generators. What is supervised, cut or dropped: see `Data`.

    Raises:
        DataError: with the first 20 faults by source and line, and the number of the rest.
    """
    # Longer than 40 lines for its words: ten settings, and one straight path.
    _require_possible(max_tokens, limit, stream, transform)
    sources = sources_of(source, limit)
    shares(weights, [1] * len(sources))
    encoder = Encoder(tokenizer, min(max_tokens, tokenizer.model_max_length))
    keep_raw = transform is not None
    with contextlib.closing(MappedWriter() if stream else InMemory()) as store:
        pipeline = Pipeline(encoder, task, labels, columns or {}, keep_raw, store)
        counts = [pipeline.take(one) for one in sources]
        examples, names = pipeline.finish(sources, counts)
    assert pipeline.schema is not None
    return Data(
        name=", ".join(one.name for one in sources),
        unit=sources[0].unit,
        task="classify" if pipeline.schema == "classify" else "causal",
        schema=pipeline.schema,
        examples=examples,
        labels=names,
        tokenizer=tokenizer,
        max_tokens=encoder.max_tokens,
        rows_read=sum(one.rows_read for one in sources),
        dropped=total(pipeline.dropped),
        parts=portions([(one.name, one.unit) for one in sources], counts, weights),
        weighted=weights is not None,
        transform=transform,
        raw=tuple(pipeline.raw) if keep_raw else None,
    )


def _require_possible(
    max_tokens: int, limit: int | None, stream: bool, transform: Transform | None
) -> None:
    if max_tokens < 2 or (limit is not None and limit < 1):
        raise DataError(
            "impossible limit",
            found=f"max_tokens={max_tokens}, limit={limit}",
            expected=">= 2, >= 1",
        )
    if stream and transform is not None:
        raise DataError(
            "stream and transform do not go together: a transform needs the rows as they were, "
            "which are kept in memory",
            hint="leave out one of them",
        )


def _family(example: Example, schema: Schema) -> bytes:
    """16 bytes that rows of one prompt (or of one text) have in common."""
    whole = schema in ("text", "classify")
    ids_T = example.ids_T if whole else example.ids_T[: example.prompt_length]
    return hashlib.sha256(ids_T.tobytes()).digest()[:16]


def _audited(data: Data) -> Audit:
    found, count = data.survey, len(data)
    causal = data.task == "causal"
    return Audit(
        task=data.task,
        rows_read=data.rows_read,
        rows=count,
        tokens=found.tokens,
        supervised_share=found.supervised / max(1, found.tokens) if causal else 1.0,
        end_token_share=found.ends / max(1, count) if causal else None,
        truncated=found.truncated,
        duplicates=found.duplicates,
        empty=data.dropped.empty,
        over_long=data.dropped.over_long,
        longest=found.longest,
        max_tokens=data.max_tokens,
        labels={name: found.labels[at] for at, name in enumerate(data.labels)},
        portions=data.parts,
        samples=tuple(
            shown(data.tokenizer, data.examples[row], data.labels)
            for row in sample_rows(data.parts)
        ),
    )
