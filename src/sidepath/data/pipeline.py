"""The one path from rows to examples: read, rename, normalise, check, tokenise, in chunks.

Whether the examples end in memory or in mapped files is the store's affair; everything in front
of it holds one chunk at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sidepath.data.classes import Classes
from sidepath.data.encode import Dropped, Encoder, encode
from sidepath.data.example import Example
from sidepath.data.faults import lines_of
from sidepath.data.forms import normalised
from sidepath.data.mapped import MappedWriter
from sidepath.data.rows import Schema, Task, check_rows, renamed, require_columns, schema_of
from sidepath.data.sources import Row, Source
from sidepath.errors import DataError


class InMemory:
    """Examples in a list."""

    def __init__(self) -> None:
        self._examples: list[Example] = []

    def __len__(self) -> int:
        return len(self._examples)

    def add(self, examples: Sequence[Example]) -> None:
        """Append examples."""
        self._examples += examples

    def finish(self, class_ids: Sequence[int]) -> tuple[Example, ...]:
        """The examples, with each label replaced by `class_ids[label]`."""
        if not class_ids:
            return tuple(self._examples)
        return tuple(
            dataclasses.replace(example, label=class_ids[example.label])
            for example in self._examples
            if example.label is not None
        )

    def close(self) -> None:
        """Nothing to close."""


@dataclass
class Pipeline:
    """Rows of several sources on their way to examples."""

    encoder: Encoder
    task: Task
    labels: Sequence[str] | None
    columns: Mapping[str, str]
    keep_raw: bool
    store: InMemory | MappedWriter
    schema: Schema | None = None
    """That of the first row, where none is given."""
    dropped: list[Dropped] = field(default_factory=list)
    """What was dropped of each source taken."""
    raw: list[Row] = field(default_factory=list)
    """The rows beside the examples, as they were before normalising; kept on request."""

    def __post_init__(self) -> None:
        self.classes = Classes(self.labels)
        self._first: Source | None = None
        self._fixed = self.schema is not None
        self._faulty = False

    @property
    def chat(self) -> bool:
        """Whether the tokenizer can render conversations."""
        return bool(self.encoder.tokenizer.chat_template)

    def take(self, source: Source) -> int:
        """Read a source to its end; the number of examples it gave.

        What is wrong with single rows is noted in `source.faults`; once there are faults, rows
        are checked only.

        Raises:
            DataError: it cannot be read, has no rows, or rows of another schema than the first.
        """
        before, known = len(self.store), False
        self.dropped.append(Dropped())
        for read in source.chunks():
            if read and not known:
                require_columns(source, read, self.columns)
            rows = renamed(read, self.columns)
            normal = normalised(source, rows, chat=self.chat)
            if normal and not known:
                self._require_schema(source, normal)
                known = True
            if normal:
                self._encode(source, rows, normal)
        if not known:
            faults = lines_of([(source.unit, source.faults)])
            raise DataError("there are no rows", where=source.name, found="nothing", faults=faults)
        return len(self.store) - before

    def _require_schema(self, source: Source, rows: Sequence[Row]) -> None:
        if self._fixed:
            return
        found = schema_of(source, rows, self.task)
        if self._first is None:
            self._first, self.schema = source, found
            return
        if found != self.schema:
            raise DataError(
                "the sources of data have different schemas",
                where=f"{self._first.name} and {source.name}",
                found=f"rows of kind {self.schema} and rows of kind {found}",
                expected="one schema in all of them",
            )

    def _encode(self, source: Source, raw: Sequence[Row], normal: Sequence[Row]) -> None:
        assert self.schema is not None
        rows = check_rows(source, normal, self.schema)
        numbers = self.classes.numbers(source, rows) if self.schema == "classify" else []
        self._faulty = self._faulty or bool(source.faults)
        # Conversations may have faults that only show when they are rendered.
        if self._faulty and (self.schema != "messages" or source.faults.full):
            return
        examples = encode(self.encoder, source, rows, self.schema, numbers, self.dropped[-1])
        if self._faulty or source.faults:
            return
        self.store.add(examples)
        if self.keep_raw:
            by_line = {row.line: row for row in raw}
            self.raw += [by_line[example.line] for example in examples]

    def finish(
        self, sources: Sequence[Source], counts: Sequence[int]
    ) -> tuple[Sequence[Example], tuple[str, ...]]:
        """The examples and the names of the classes; `counts` is what each `take` returned.

        Raises:
            DataError: with every fault found, by source and line; a source without examples.
        """
        classified = self.schema == "classify"
        class_ids, names = self.classes.settle() if classified else ([], ())
        where = ", ".join(source.name for source in sources)
        several = len(sources) > 1
        faults = lines_of(
            (f"{source.name}, {source.unit}" if several else source.unit, source.faults)
            for source in sources
        )
        if faults:
            raise DataError("the data have faults", where=where, faults=faults)
        taken = zip(sources, counts, self.dropped, strict=True)
        bare = [(source, dropped) for source, count, dropped in taken if not count]
        if bare:
            raise DataError(
                "no row is left to train on",
                where=", ".join(source.name for source, _ in bare),
                found="; ".join(
                    f"{source.rows_read} rows: {dropped.empty} empty, {dropped.over_long} over-long"
                    for source, dropped in bare
                ),
                expected=f"rows of at most {self.encoder.max_tokens} tokens "
                "with something to learn",
            )
        return self.store.finish(class_ids), names


def encode_one(
    encoder: Encoder, row: Row, place: str, schema: Schema, labels: tuple[str, ...]
) -> Example:
    """One row of known schema and classes as an example. Raises a `DataError` naming `place`."""
    store = InMemory()
    source = Source(place, "row", lambda: (item for item in [(row.line, row.fields, None)]))
    pipeline = Pipeline(encoder, "auto", labels or None, {}, False, store, schema=schema)
    pipeline.take(source)
    return pipeline.finish([source], [len(store)])[0][0]
