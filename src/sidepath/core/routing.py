"""Which adapter answers: one small object that every adapted layer of a model reads.

Writing to it takes effect in all layers at once, so switching costs the same whatever the
number of layers and of adapters. There is one per model, handed to its layers at injection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sidepath.kernels.routed import RowPlan, Stack

if TYPE_CHECKING:
    from sidepath.core.delta import Delta

RowIndex = slice | Tensor
"""Rows of a batch: a slice where they lie together (no copy), else their positions."""

Placed = Sequence[tuple["Delta", RowIndex]]
"""Some deltas of one layer, each with the rows it answers."""


@dataclass
class Layer:
    """A layer's adapters while rows are routed to them, without gradients."""

    stack: Stack | None
    others: Placed
    """The deltas that are no factors."""
    arranged: tuple[object, RowPlan | None, Tensor, Tensor] | None = None
    """For inputs of the last size: that size, the plan, and both factors as it takes them."""


@dataclass(frozen=True)
class Rows:
    """A batch's rows by the adapter that answers them; rows of the base are in no group.

    A slot is an adapter's place in `groups`: the order of first appearance.
    """

    count: int
    groups: tuple[tuple[str, RowIndex], ...]
    slots: tuple[int, ...]
    """The slot of each row; -1: the base's."""
    layers: dict[object, Layer] = field(default_factory=dict, compare=False)
    """By layer and dtype: its adapters, as they were when it first answered without gradients.
    With gradients nothing is kept of them."""
    tiles: dict[object, Any] = field(default_factory=dict, compare=False)
    """The rows as a GPU's kernels take them (`kernels/on_gpu.py`)."""
    plans: dict[object, RowPlan | None] = field(default_factory=dict, compare=False)
    """By the stack's ranks and the input's size: how its rows are multiplied."""


class Routing:
    """The state layers read: the active adapter, or rows with one adapter each."""

    def __init__(self) -> None:
        self.active = None
        self.rows: Rows | None = None
        self.silent = False
        """True while the side paths must not act: disabled, or folded into the weights."""
        self.fused = True
        """Whether fused kernels take the place of the plain ones where they can."""

    @property
    def active(self) -> str | None:
        """The adapter that answers every row; None: the base."""
        return self._active

    @active.setter
    def active(self, name: str | None) -> None:
        self._active = name
        self.key = "" if name is None else key_of(name)
        """The module key of the active adapter's deltas, worked out once and not in each layer;
        empty for the base, whose deltas nobody has."""


def key_of(name: str) -> str:
    """An adapter's name as a module key: torch refuses dots and names of its own methods."""
    return "@" + name.replace(".", "/")


def name_of(key: str) -> str:
    """The inverse of `key_of`; no adapter's name has a slash."""
    return key[1:].replace("/", ".")


def first_row(index: RowIndex) -> int:
    """The first of some rows of a batch."""
    return int(index.start) if isinstance(index, slice) else int(index[0])


def group_rows(names: Sequence[str | None]) -> Rows:
    """Group a batch's rows by adapter, in order of first appearance."""
    positions: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        if name is not None:
            positions.setdefault(name, []).append(row)
    slot_of = {name: slot for slot, name in enumerate(positions)}
    return Rows(
        len(names),
        tuple((name, _index(rows)) for name, rows in positions.items()),
        tuple(-1 if name is None else slot_of[name] for name in names),
    )


def _index(rows: list[int]) -> RowIndex:
    together = rows[-1] - rows[0] + 1 == len(rows)
    return slice(rows[0], rows[-1] + 1) if together else torch.tensor(rows)
