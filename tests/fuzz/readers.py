"""Every reader of files from outside. A new format is one more `Reader` in a module's table."""

from __future__ import annotations

from tests.fuzz import adapters, bases, formats, records, rows, tokens
from tests.fuzz.reader import Reader

READERS: tuple[Reader, ...] = (
    *adapters.READERS,
    *tokens.READERS,
    *formats.READERS,
    *records.READERS,
    *bases.READERS,
    *rows.READERS,
)
"""What is not here is not fuzzed."""
