"""Texts of the user's that a merged model is run on beside the un-merged one (floor 7)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sidepath.errors import DataError

MAX_ROWS = 2048
"""Rows that are read at most: each gives a token or more, and no more tokens are looked at."""
_FIELDS = ("text", "prompt", "completion")


def calibration_of(given: str) -> list[str]:
    """The texts of a file: the lines of a `.txt`, else what is said in the rows of training data.

    Errors: one `DataError` with all faults; when the file cannot be read, or says nothing.
    """
    texts = list(_lines(Path(given)) if given.lower().endswith(".txt") else _rows(given))
    if not texts:
        raise DataError("there are no calibration texts", where=given, found="no text in any row")
    return texts


def _lines(path: Path) -> Iterator[str]:
    from sidepath.data.tables import lines

    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in itertools.islice(lines(file, path), MAX_ROWS):
                if line.strip():
                    yield line.strip()
    except UnicodeDecodeError as error:
        raise DataError("the file is no text in UTF-8", where=path, found=str(error)) from error
    except OSError as error:
        raise DataError("the data file cannot be read", where=path, found=error.strerror) from error


def _rows(given: str) -> Iterator[str]:
    from sidepath.data.faults import lines_of
    from sidepath.data.sources import open_source

    source = open_source(given, MAX_ROWS)
    for rows in source.chunks():
        for row in rows:
            text = "\n".join(_said(row.fields))
            if text:
                yield text
            else:
                source.fault(row.line, "no text")
    faults = lines_of([(source.unit, source.faults)])
    if faults:
        raise DataError(
            "the calibration texts have faults",
            where=given,
            faults=faults,
            expected="text, prompt, prompt and completion, or messages",
        )


def _said(fields: Mapping[str, Any]) -> Iterator[str]:
    messages: Iterable[Any] = fields.get("messages") or ()
    said = [fields.get(name) for name in _FIELDS]
    said += [message.get("content") for message in messages if isinstance(message, Mapping)]
    return (text for text in said if isinstance(text, str) and text)
