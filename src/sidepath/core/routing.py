"""Which adapter answers: one small object that every adapted layer of a model reads.

Writing to it takes effect in all layers at once, so switching costs the same whatever the
number of layers and of adapters. There is one per model, handed to its layers at injection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

RowIndex = slice | Tensor
"""Rows of a batch: a slice where they lie together (no copy), else their positions."""


@dataclass(frozen=True)
class Rows:
    """A batch's rows by the adapter that answers them; rows of the base are in no group."""

    count: int
    groups: tuple[tuple[str, RowIndex], ...]
    kept: dict[object, Tensor] = field(default_factory=dict, compare=False)
    """What layers work out of the groups alone, for the layers after them."""


@dataclass
class Routing:
    """The state layers read: the active adapter, or rows with one adapter each."""

    active: str | None = None
    rows: Rows | None = None
    silent: bool = field(default=False)
    """True while the side paths must not act: disabled, or folded into the weights."""
    fused: bool = True
    """Whether fused kernels take the place of the plain ones where they can."""


def first_row(index: RowIndex) -> int:
    """The first of some rows of a batch."""
    return int(index.start) if isinstance(index, slice) else int(index[0])


def group_rows(names: Sequence[str | None]) -> Rows:
    """Group a batch's rows by adapter, in order of first appearance."""
    positions: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        if name is not None:
            positions.setdefault(name, []).append(row)
    return Rows(len(names), tuple((name, _index(rows)) for name, rows in positions.items()))


def _index(rows: list[int]) -> RowIndex:
    together = rows[-1] - rows[0] + 1 == len(rows)
    return slice(rows[0], rows[-1] + 1) if together else torch.tensor(rows)
