"""Rows of files, data sets of a hub, and lists, each with the line it stands on, in chunks.

Nothing is raised for a single bad line: faults are collected, so that the caller can report
a broken line 7 and a missing column on line 9 in one error.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidepath.data.faults import Faults
from sidepath.data.hub import hub_rows, parse_hub_name
from sidepath.data.tables import FORMATS, Items, file_items
from sidepath.errors import DataError
from sidepath.store.hub import PREFIX

CHUNK = 1024
"""Lines read, checked and tokenised together; of long rows more would fill the memory."""

Rows = Sequence[Mapping[str, Any]]
Place = str | os.PathLike[str]


@dataclass(frozen=True)
class Row:
    """One row: its fields and the line (for a list: the position, from 1) it stands on."""

    line: int
    fields: Mapping[str, Any]


class Source:
    """One place that rows come from; `name` and `unit` ("line" or "row") speak of it.

    `chunks` reads the rows once, from the beginning to `limit` of them; what follows the last
    one is not read.
    """

    def __init__(
        self, name: str, unit: str, items: Callable[[], Items], limit: int | None = None
    ) -> None:
        self.name, self.unit = name, unit
        self.faults = Faults()
        self.rows_read = 0
        self._items, self._limit = items, limit

    def fault(self, line: int, text: str) -> None:
        """Note that something is wrong on a line."""
        self.faults.add(line, text)

    def chunks(self) -> Iterator[list[Row]]:
        """The rows, at most `CHUNK` lines at a time; lines that are no row become faults.

        Raises:
            DataError: there is no such file, or it cannot be read.
        """
        with closing(self._rows()) as rows:
            while lines := list(itertools.islice(rows, CHUNK)):
                yield [row for row in lines if row is not None]

    def _rows(self) -> Generator[Row | None, None, None]:
        """A row for each line that is one, None for the others."""
        with closing(self._items()) as items:
            while self._limit is None or self.rows_read < self._limit:
                item = next(items, None)
                if item is None:
                    return
                line, fields, fault = item
                row = None
                if fault is not None:
                    self.fault(line, fault)
                elif isinstance(fields, Mapping) and all(isinstance(key, str) for key in fields):
                    self.rows_read += 1
                    row = Row(line, fields)
                else:
                    self.fault(line, f"expected named fields, found {type(fields).__name__}")
                yield row


def sources_of(source: Place | Sequence[Place] | Rows, limit: int | None) -> list[Source]:
    """A source for each file or data set named, or one for rows that are given as they are.

    Raises:
        DataError: a name of no known format; files and rows in one list; the same file twice.
    """
    if isinstance(source, (str, os.PathLike)):
        return [open_source(source, limit)]
    if not len(source) or not isinstance(source[0], (str, os.PathLike)):
        rows: Iterable[Any] = source
        items = lambda: ((at, row, None) for at, row in enumerate(rows, start=1))  # noqa: E731
        return [Source("the given rows", "row", items, limit)]
    places = [item for item in source if isinstance(item, (str, os.PathLike))]
    if len(places) != len(source):
        raise DataError(
            "data are either names of files or rows, not both in one list",
            found=f"{len(places)} names and {len(source) - len(places)} other things",
        )
    names = [os.fspath(place) for place in places]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            "a source of data is named twice",
            found=", ".join(twice),
            hint="to see its rows more often, give weights",
        )
    return [open_source(place, limit) for place in places]


def open_source(place: Place, limit: int | None = None) -> Source:
    """The rows of one file, or of a hub's data set ("hub:owner/name"); nothing is read yet.

    Raises:
        DataError: a name of no known format.
    """
    text = os.fspath(place)
    if text.startswith(PREFIX):
        name = parse_hub_name(text)
        return Source(text, "row", lambda: hub_rows(name), limit)
    path = Path(place)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = suffixes[-2 if packed else -1] if len(suffixes) > packed else ""
    if kind not in FORMATS or (packed and not FORMATS[kind].text):
        known = ", ".join(name for name, form in FORMATS.items() if form.text)
        raise DataError(
            "the data file is of no known format",
            where=path,
            found=path.suffix or "no suffix",
            expected=f"{known} (each also with .gz), .parquet, or {PREFIX}OWNER/NAME",
        )
    return Source(str(path), FORMATS[kind].unit, lambda: file_items(path, kind, packed), limit)
