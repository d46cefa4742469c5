"""Readers of file formats: the rows of JSONL, JSON, CSV, TSV (each also `.gz`) and Parquet.

Each reader yields (line, fields, None) for a row and (line, None, fault) for a line that is none,
and holds no more of the file than it needs: a line, or one batch of a Parquet row group. (A
`.json` file is one list, and is read whole.)
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from sidepath.errors import DataError

Item = tuple[int, Any, str | None]
"""(line, fields, what is wrong with the line or None)."""
Items = Generator[Item, None, None]
_ROW_ERRORS = (ValueError, RecursionError)
LINE = 2**26
"""Characters of the longest line that is read."""
PARQUET_BATCH = 1024
"""Rows of a Parquet file that are in memory at once as Python objects."""


def file_items(path: Path, kind: str, packed: bool) -> Items:
    """The lines of a file of the given kind (a key of `FORMATS`).

    Raises:
        DataError: the file cannot be read, or what was read is damaged.
    """
    form = FORMATS[kind]
    try:
        if form.text:
            with _opened(path, packed) as stream:
                yield from form.read(stream, path)
        else:
            yield from form.read(path, path)
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


def lines(stream: TextIO, path: Path) -> Iterator[str]:
    """The lines of a stream. Errors: `DataError` for one that is longer than `LINE`."""
    while line := stream.readline(LINE + 1):
        if len(line) > LINE:
            raise DataError(
                f"a line of the data file is longer than {LINE:,} characters",
                where=path,
                hint="see that it is a text file with one row a line",
            )
        yield line


def _jsonl(stream: TextIO, path: Path) -> Items:
    for number, line in enumerate(lines(stream, path), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except _ROW_ERRORS as error:
            yield number, None, f"not JSON ({_reason(error)}): {line.strip()[:60]}"
        else:
            yield number, item, None


def _json(stream: TextIO, path: Path) -> Items:
    text = stream.read()
    if not text.strip():
        return
    try:
        items = json.loads(text)
    except _ROW_ERRORS as error:
        raise DataError("the data file is not JSON", where=path, found=_reason(error)) from None
    if not isinstance(items, list):
        raise DataError(
            "a .json data file holds one list of rows",
            where=path,
            found=type(items).__name__,
            hint="use .jsonl for one JSON object a line",
        )
    for number, item in enumerate(items, start=1):
        yield number, item, None


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno} column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _csv(stream: TextIO, path: Path) -> Items:
    return _table(csv.reader(lines(stream, path), strict=True))


def _tsv(stream: TextIO, path: Path) -> Items:
    """Tab-separated as GLUE has it: a quotation mark is a character like any other."""
    return _table(csv.reader(lines(stream, path), delimiter="\t", quoting=csv.QUOTE_NONE))


def _table(reader: Any) -> Items:
    # The module's own limit, 128 KiB a field, is less than a long document; it holds for all of
    # a process, so it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), LINE))
    header: list[str] | None = None
    line = 1
    while True:
        try:
            record = next(reader, None)
        except csv.Error as error:
            yield line, None, f"not a table ({error}); nothing after it was read"
            return
        if record is None:
            return
        if record and header is None:
            header = record
            if twice := sorted({name for name in header if name and header.count(name) > 1}):
                yield line, None, f"the header names {', '.join(twice)} twice; nothing was read"
                return
        elif record and header is not None:
            if len(record) == len(header):
                yield line, dict(zip(header, record, strict=True)), None
            else:
                yield line, None, f"{len(record)} fields where the header has {len(header)}"
        line = reader.line_num + 1


def _parquet(path: Path, _: Path) -> Items:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=PARQUET_BATCH):
                for fields in batch.to_pylist():
                    number += 1
                    yield number, fields, None
    except (pyarrow.ArrowException, ValueError) as error:
        where = f" after row {number}" if number else ""
        reason = str(error).partition("\n")[0]
        raise DataError(
            "the Parquet file is damaged, or is none", where=path, found=reason + where
        ) from error


@dataclass(frozen=True)
class Format:
    """How a kind of file is read; a text file may be packed with gzip."""

    read: Callable[[Any, Path], Items]
    unit: str = "line"
    text: bool = True


FORMATS: dict[str, Format] = {
    ".jsonl": Format(_jsonl),
    ".ndjson": Format(_jsonl),
    ".json": Format(_json, unit="row"),
    ".csv": Format(_csv),
    ".tsv": Format(_tsv),
    ".parquet": Format(_parquet, unit="row", text=False),
}
