"""Sample rows for the audit, as text with the mask visible."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from sidepath.data.example import Example
from sidepath.data.portions import Portion

SAMPLES = 5
"""Rows shown in the audit."""
WIDTH = 300
"""Most characters of a row shown."""
GAP = " … "
_ENDS = 12
"""Characters kept on each side of a shortened piece when pieces have to go."""


def sample_rows(parts: Sequence[Portion]) -> list[int]:
    """The first rows of each portion in turn, `SAMPLES` in all."""
    turns = itertools.zip_longest(*(range(part.start, part.stop)[:SAMPLES] for part in parts))
    rows = (row for turn in turns for row in turn if row is not None)
    return list(itertools.islice(rows, SAMPLES))


def shown(tokenizer: Any, example: Example, labels: Sequence[str]) -> str:
    """The row as text, ⟦ and ⟧ around what is supervised, at most `WIDTH` characters.

    Every piece (a stretch that is supervised, or is not) loses its middle where the row is
    too long; where even that leaves too much, pieces in the middle go.
    """
    label = "" if example.label is None else f" ⟦{_without_middle(labels[example.label], 60)}⟧"
    pieces = _pieces(tokenizer, example)
    limit = WIDTH
    while len(text := _joined(pieces, limit)) + len(label) > WIDTH and limit > 2 * _ENDS:
        limit = limit * 3 // 4
    while len(text) + len(label) > WIDTH and len(pieces) > 3:
        middle = len(pieces) // 2
        # The first piece is the row's beginning, the last its answer: those stay.
        pieces = [*pieces[: middle - 1], (GAP.strip(), False), *pieces[middle + 1 :]]
        text = _joined(pieces, limit)
    return text + label


def _pieces(tokenizer: Any, example: Example) -> list[tuple[str, bool]]:
    """(text, supervised) of each stretch."""
    borders = (np.flatnonzero(np.diff(example.supervised_T)) + 1).tolist()
    edges = [0, *borders, len(example.ids_T)]
    pieces = []
    for start, stop in itertools.pairwise(edges):
        text = str(tokenizer.decode(example.ids_T[start:stop].tolist())).replace("\n", "⏎")
        pieces.append((text, bool(example.supervised_T[start:stop].any())))
    return pieces


def _joined(pieces: Sequence[tuple[str, bool]], limit: int) -> str:
    short = [(_without_middle(text, limit), supervised) for text, supervised in pieces]
    return " ".join(f"⟦{text}⟧" if supervised else text for text, supervised in short)


def _without_middle(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    head = (limit - len(GAP)) // 2
    return f"{text[:head]}{GAP}{text[len(text) - head :]}"
