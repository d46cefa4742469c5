"""Rows of a file or a list, each with the line it stands on (JSONL, JSON, CSV, TSV, `.gz`).

Nothing is raised for a single bad line: faults are collected, so that the caller can report
a broken line 7 and a missing column on line 9 in one error.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from sidepath.errors import DataError

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_ROW_ERRORS = (ValueError, RecursionError)


@dataclass(frozen=True)
class Row:
    """One row: its fields and the line (for a list: the position, from 1) it stands on."""

    line: int
    fields: Mapping[str, Any]


@dataclass
class Source:
    """What was read: `name` and `unit` ("line" or "row") speak of it in messages."""

    name: str
    unit: str
    rows: list[Row] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def fault(self, line: int, text: str) -> None:
        """Note that something is wrong on a line."""
        self.faults.append(f"{self.unit} {line}: {text}")


def read_source(
    source: str | os.PathLike[str] | Sequence[Mapping[str, Any]], limit: int | None
) -> Source:
    """The rows of `source`, at most `limit` of them; lines after the last one are not read.

    Raises:
        DataError: there is no such file, it cannot be read, or it is of no known format.
    """
    if isinstance(source, (str, os.PathLike)):
        return _read_file(Path(source), limit)
    found = Source("the given rows", "row")
    for number, item in enumerate(source[:limit], start=1):
        _keep(found, number, item)
    return found


def _keep(found: Source, line: int, item: Any) -> None:
    if isinstance(item, Mapping) and all(isinstance(key, str) for key in item):
        found.rows.append(Row(line, item))
    else:
        found.fault(line, f"expected named fields, found {type(item).__name__}")


def _read_file(path: Path, limit: int | None) -> Source:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = suffixes[-2 if packed else -1] if len(suffixes) > packed else ""
    if kind not in FORMATS:
        raise DataError(
            "the data file is of no known format",
            where=path,
            found=path.suffix or "no suffix",
            expected=", ".join(FORMATS) + ", each also with .gz",
        )
    readers = {".json": _read_json, ".csv": _read_csv, ".tsv": _read_tsv}
    reader = readers.get(kind, _read_jsonl)
    try:
        with _opened(path, packed) as stream:
            found = Source(str(path), "line")
            reader(stream, found, limit)
            return found
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError("the data file cannot be read", where=path, found=reason) from error


@contextlib.contextmanager
def _opened(path: Path, packed: bool) -> Iterator[TextIO]:
    with path.open("rb") as raw:
        stream = gzip.GzipFile(fileobj=raw) if packed else raw
        # Bytes that are no UTF-8 become lone surrogates, which the row check names by line.
        with io.TextIOWrapper(
            stream, encoding="utf-8-sig", errors="surrogateescape", newline=""
        ) as text:
            yield text


def _read_jsonl(stream: Iterable[str], found: Source, limit: int | None) -> None:
    for number, line in enumerate(stream, start=1):
        if limit is not None and len(found.rows) >= limit:
            return
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except _ROW_ERRORS as error:
            found.fault(number, f"not JSON ({_reason(error)}): {line.strip()[:60]}")
            continue
        _keep(found, number, item)


def _read_json(stream: TextIO, found: Source, limit: int | None) -> None:
    text = stream.read()
    found.unit = "row"
    if not text.strip():
        return
    try:
        items = json.loads(text)
    except _ROW_ERRORS as error:
        raise DataError(
            "the data file is not JSON", where=found.name, found=_reason(error)
        ) from None
    if not isinstance(items, list):
        raise DataError(
            "a .json data file holds one list of rows",
            where=found.name,
            found=type(items).__name__,
            hint="use .jsonl for one JSON object a line",
        )
    for number, item in enumerate(items[:limit], start=1):
        _keep(found, number, item)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno} column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _read_csv(stream: Iterable[str], found: Source, limit: int | None) -> None:
    _read_table(csv.reader(stream, strict=True), found, limit)


def _read_tsv(stream: Iterable[str], found: Source, limit: int | None) -> None:
    """Tab-separated as GLUE has it: a quotation mark is a character like any other."""
    lines = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
    _read_table(lines, found, limit)


def _read_table(reader: Any, found: Source, limit: int | None) -> None:
    header: list[str] | None = None
    line = 1
    while limit is None or len(found.rows) < limit:
        try:
            record = next(reader, None)
        except csv.Error as error:
            found.fault(line, f"not a table ({error}); nothing after it was read")
            return
        if record is None:
            return
        if record and header is None:
            header = record
        elif record and header is not None:
            if len(record) == len(header):
                found.rows.append(Row(line, dict(zip(header, record, strict=True))))
            else:
                found.fault(line, f"{len(record)} fields where the header has {len(header)}")
        line = reader.line_num + 1
