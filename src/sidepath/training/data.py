"""Data for training and evaluation: rows of a file become examples, with their audit."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sidepath.errors import DataError, TrainError
from sidepath.training.audit import Audit
from sidepath.training.batching import Example
from sidepath.training.encode import Dropped, Encoder, encode
from sidepath.training.portions import Portion, portion_of, regrouped
from sidepath.training.rng import derived
from sidepath.training.rows import Schema, Task, check_rows, class_ids, rename, schema_of
from sidepath.training.sources import Row, Source, read_source
from sidepath.training.transform import Transform, identity_of

SAMPLES = 3
"""Rows shown in the audit."""


@dataclass(frozen=True, eq=False)
class Data:
    """Tokenised rows of one task."""

    name: str
    """The file, or what stands for it in messages."""
    unit: str
    """What `Example.line` counts: "line" or "row"."""
    task: Literal["causal", "classify"]
    schema: Schema
    examples: tuple[Example, ...]
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
        try:
            fields = self.transform(copy.deepcopy(dict(raw.fields)))
        except Exception as error:
            raise DataError(
                "the transform failed", where=self.place(row), found=repr(error)
            ) from error
        found = Source(self.place(row), "row")
        if not isinstance(fields, Mapping):
            found.fault(raw.line, f"expected named fields, found {type(fields).__name__}")
            fields = {}
        found.rows = [Row(raw.line, fields)]
        rows = [] if found.faults else check_rows(found, self.schema)
        classified = self.schema == "classify"
        class_of, _ = class_ids(found, rows, self.labels) if classified else ([], ())
        encoder = Encoder(self.tokenizer, self.max_tokens)
        examples, dropped = encode(encoder, found, rows, self.schema, class_of)
        if found.faults or not examples:
            faults = [fault.partition(": ")[2] for fault in found.faults]
            empty = "nothing in it to learn" if dropped.empty else "over-long"
            raise DataError(
                "the transform gave a row that cannot be used",
                where=self.place(row),
                faults=faults or [empty],
            )
        return examples[0]

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What a resumed run's data must have in common with these, as plain values.

        The rows' digest, the weights (null when none were given), and the transform's name with
        the SHA-256 of its source text (null where Python cannot get it). What a transform
        reads from elsewhere is not in it.
        """
        return {
            "digest": self.digest,
            "weights": [part.weight for part in self.parts] if self.weighted else None,
            "transform": identity_of(self.transform),
        }

    @property
    def pad_id(self) -> int:
        """The padding token: the tokenizer's, or its end token, or 0; masked in any case."""
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return int(next(token for token in candidates if token is not None))

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(example.ids_T) for example in self.examples]

    @functools.cached_property
    def largest_id(self) -> int:
        """The largest token id of all examples."""
        return max(int(example.ids_T.max()) for example in self.examples)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of everything training sees of the rows, in order."""
        digest = hashlib.sha256(f"{self.task} {self.pad_id} {self.labels}".encode())
        for example in self.examples:
            digest.update(fingerprint_of(example))
        return digest.hexdigest()

    @functools.cached_property
    def audit(self) -> Audit:
        """What the rows hold; see `Audit`."""
        return _audited(self)

    def prompts(self) -> list[list[int]]:
        """Token ids that generation starts from, one list an example (causal rows)."""
        return [example.ids_T[: example.prompt_length].tolist() for example in self.examples]

    def subset(self, rows: Sequence[int]) -> Data:
        """The examples at these positions, in this order (those of one portion together)."""
        rows, parts = regrouped(self.parts, rows)
        chosen = tuple(self.examples[row] for row in rows)
        raw = None if self.raw is None else tuple(self.raw[row] for row in rows)
        return dataclasses.replace(
            self, examples=chosen, raw=raw, parts=parts, rows_read=len(chosen), dropped=Dropped()
        )

    def split(self, share: float, *, seed: int) -> tuple[Data, Data]:
        """Training rows and about `share` of the rows held out (at least one).

        Rows with the same prompt (or the same text) stay on one side, so that nothing held out
        was seen in training. The same seed gives the same split.
        """
        families: dict[bytes, list[int]] = {}
        for row, example in enumerate(self.examples):
            families.setdefault(_family(example, self.schema), []).append(row)
        order = np.random.default_rng([seed, len(self)]).permutation(len(families))
        wanted = max(1, round(share * len(self)))
        members = list(families.values())
        held: set[int] = set()
        for at in order.tolist():
            if len(held) >= wanted:
                break
            held.update(members[at])
        if len(held) == len(self):
            raise TrainError(
                "no row is left to train on after holding rows out",
                found=f"{len(self)} rows, {len(families)} different prompts",
                hint="give more rows, or evaluation data of their own",
            )
        kept = [row for row in range(len(self)) if row not in held]
        return self.subset(kept), self.subset(sorted(held))


def load_data(
    source: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_tokens: int = 1024,
    limit: int | None = None,
    task: Task = "auto",
    labels: Sequence[str] | None = None,
    columns: Mapping[str, str] | None = None,
    transform: Transform | None = None,
) -> Data:
    """Read, check and tokenise rows.

    Rows come from a file (.jsonl, .json, .csv, .tsv, each also .gz) or a list of mappings, and
    have one schema: `messages`, `prompt` + `completion`, `text` + `label`, or `text`. `columns`
    maps a schema's names to the file's: `{"prompt": "mr", "completion": "ref"}`.

    A completion is tokenised apart from its prompt, so that generation starts from the very
    tokens training saw: [start] prompt completion [end], with the completion and the end token
    supervised. Of `messages` the assistant's turns are supervised, of plain `text` everything.

    A row longer than `max_tokens` (never more than the tokenizer's own limit) is cut: prompts
    and conversations from the left, keeping the (last) completion whole; plain and labelled
    texts from the right. A row whose completion alone is too long, or empty, is dropped. The
    audit counts each of these.

    Raises:
        DataError: with every fault found, by line.
    """
    if max_tokens < 2 or (limit is not None and limit < 1):
        raise DataError(
            "impossible limit",
            found=f"max_tokens={max_tokens}, limit={limit}",
            expected=">= 2, >= 1",
        )
    found = read_source(source, limit)
    rename(found, columns)
    schema = schema_of(found, task)
    rows = check_rows(found, schema)
    classified = schema == "classify"
    class_of, names = class_ids(found, rows, labels) if classified else ([], ())
    encoder = Encoder(tokenizer, min(max_tokens, tokenizer.model_max_length))
    examples, dropped = encode(encoder, found, rows, schema, class_of)
    _require_usable(found, examples, dropped, encoder.max_tokens)
    by_line = {row.line: row for row in rows}
    kept = tuple(by_line[example.line] for example in examples)
    return Data(
        name=found.name,
        unit=found.unit,
        task="classify" if classified else "causal",
        schema=schema,
        examples=tuple(examples),
        labels=names,
        tokenizer=tokenizer,
        max_tokens=encoder.max_tokens,
        rows_read=len(found.rows),
        dropped=dropped,
        parts=(Portion(found.name, 0, len(examples), 1.0, found.unit),),
        transform=transform,
        raw=kept if transform is not None else None,
    )


def _require_usable(
    found: Source, examples: Sequence[Example], dropped: Dropped, max_tokens: int
) -> None:
    if found.faults:
        raise DataError("the data have faults", where=found.name, faults=_in_order(found.faults))
    if not examples:
        raise DataError(
            "no row is left to train on",
            where=found.name,
            found=f"{len(found.rows)} rows: {dropped.empty} empty, {dropped.over_long} over-long",
            expected=f"rows of at most {max_tokens} tokens with something to learn",
        )


def _in_order(faults: Sequence[str]) -> list[str]:
    """Faults by line; each starts with "line 7:" or "row 7:"."""
    return sorted(faults, key=lambda fault: int(fault.split(":", 1)[0].split()[1]))


def fingerprint_of(example: Example) -> bytes:
    """SHA-256 of what training sees of one example."""
    digest = hashlib.sha256(example.ids_T.tobytes())
    digest.update(example.supervised_T.tobytes())
    digest.update(str(example.label).encode())
    return digest.digest()


def _family(example: Example, schema: Schema) -> bytes:
    whole = schema in ("text", "classify")
    return (example.ids_T if whole else example.ids_T[: example.prompt_length]).tobytes()


def _audited(data: Data) -> Audit:
    examples, count = data.examples, len(data)
    tokens = sum(data.lengths)
    causal = data.task == "causal"
    supervised = sum(int(example.supervised_T.sum()) for example in examples)
    return Audit(
        task=data.task,
        rows_read=data.rows_read,
        rows=count,
        tokens=tokens,
        supervised_share=supervised / tokens if causal else 1.0,
        end_token_share=sum(example.ends for example in examples) / count if causal else None,
        truncated=sum(example.truncated for example in examples),
        duplicates=count - len({fingerprint_of(example) for example in examples}),
        empty=data.dropped.empty,
        over_long=data.dropped.over_long,
        longest=max(data.lengths),
        max_tokens=data.max_tokens,
        labels={
            name: sum(example.label == at for example in examples)
            for at, name in enumerate(data.labels)
        },
        samples=tuple(_shown(data, example) for example in examples[:SAMPLES]),
    )


def _shown(data: Data, example: Example) -> str:
    """The row as text, with ⟦ and ⟧ around what is supervised."""
    borders = (np.flatnonzero(np.diff(example.supervised_T)) + 1).tolist()
    edges = [0, *borders, len(example.ids_T)]
    pieces = []
    for start, stop in itertools.pairwise(edges):
        text = data.tokenizer.decode(example.ids_T[start:stop].tolist())
        pieces.append(f"⟦{text}⟧" if example.supervised_T[start] else text)
    shown = " ".join(pieces).replace("\n", "⏎")
    return shown if example.label is None else f"{shown} ⟦{data.labels[example.label]}⟧"
