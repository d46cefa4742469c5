"""How the stacked factors of a routed batch are multiplied: three forms, chosen by arithmetic.

A plan is made once for a batch's rows and used by every layer whose stack has the same ranks. Each
form knows how to *take* its rows out of a batch, *shrink* them to their adapters' ranks, *expand*
those onto an output in place, and make the *outer* product that is a factor's gradient.

Dimensions: B rows, M rows taken, T tokens a row, D in or out, S sum of the ranks, G tiles,
W ranks of a tile, n tokens of a tile.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CALL = 12e-6
"""Seconds an operator costs whatever its size (7 in float32, 17 in bfloat16, on two cores)."""
RATE = 50e9
"""Multiply-adds a second of a product of some tens of columns."""
COPY = 4e9
"""Numbers a second that are gathered into a new tensor."""


@dataclass(frozen=True)
class RowPlan(ABC):
    """The rows that some adapter answers, in the order of their slots, and a way to multiply."""

    rows: slice | Tensor
    """A slice where they lie together in that order; else their positions, padded at the end."""
    real: Tensor | None
    """The positions without the padding, where `rows` are positions."""

    def take(self, x_BTD: Tensor) -> Tensor:
        """The plan's rows (M, T, D): a view where they are a slice."""
        if isinstance(self.rows, slice):
            return x_BTD[self.rows]
        return x_BTD.index_select(0, self.rows)

    def put_(self, y_BTD: Tensor, part_MTD: Tensor) -> None:
        """Write back what `take` gave, changed. In place; nothing to do for a view."""
        if self.real is not None:
            y_BTD.index_copy_(0, self.real, part_MTD[: len(self.real)])

    @abstractmethod
    def shrink(self, x_MTD: Tensor, F_SD: Tensor) -> Any:
        """Each token's products with its own adapter's rows of a stack of factors."""

    @abstractmethod
    def expand_(self, y_MTD: Tensor, hidden: Any, F_SD: Tensor) -> None:
        """Add what `shrink` gave, times each adapter's rows of a stack, to `y`. In place."""

    @abstractmethod
    def outer(self, hidden: Any, x_MTD: Tensor, ranks: int) -> Tensor:
        """The gradient (S, D) of a stack of factors: sums of hidden x over each one's tokens."""


@dataclass(frozen=True)
class Masked(RowPlan):
    """One product over all factors, then a mask: for few tokens or few columns."""

    mask_B1S: Tensor

    def shrink(self, x_MTD: Tensor, F_SD: Tensor) -> Tensor:
        hidden_MTS = F.linear(x_MTD.reshape(-1, x_MTD.shape[-1]), F_SD).view(*x_MTD.shape[:2], -1)
        return hidden_MTS.mul_(self.mask_B1S)

    def expand_(self, y_MTD: Tensor, hidden: Tensor, F_SD: Tensor) -> None:
        y_MTD.view(-1, y_MTD.shape[-1]).addmm_(hidden.flatten(0, 1), F_SD)

    def outer(self, hidden: Tensor, x_MTD: Tensor, ranks: int) -> Tensor:
        return hidden.flatten(0, 1).T @ x_MTD.reshape(-1, x_MTD.shape[-1])


@dataclass(frozen=True)
class Slices(RowPlan):
    """Two products an adapter, on its own slice of the rows: for few adapters of many tokens."""

    parts: tuple[tuple[slice, slice], ...]
    """The rows taken and the ranks, of each adapter."""

    def shrink(self, x_MTD: Tensor, F_SD: Tensor) -> list[Tensor]:
        columns = x_MTD.shape[-1]
        return [
            F.linear(x_MTD[rows].reshape(-1, columns), F_SD[ranks]) for rows, ranks in self.parts
        ]

    def expand_(self, y_MTD: Tensor, hidden: list[Tensor], F_SD: Tensor) -> None:
        for (rows, ranks), hidden_NR in zip(self.parts, hidden, strict=True):
            y_MTD[rows].view(-1, y_MTD.shape[-1]).addmm_(hidden_NR, F_SD[ranks])

    def outer(self, hidden: list[Tensor], x_MTD: Tensor, ranks: int) -> Tensor:
        gradient_SD = x_MTD.new_zeros(ranks, x_MTD.shape[-1])
        for (rows, own), hidden_NR in zip(self.parts, hidden, strict=True):
            torch.mm(hidden_NR.T, x_MTD[rows].reshape(-1, x_MTD.shape[-1]), out=gradient_SD[own])
        return gradient_SD


@dataclass(frozen=True)
class Tiles(RowPlan):
    """Batched products of G tiles of equal size: for many adapters of few tokens.

    Where every adapter has as many rows and ranks as the next, a tile is an adapter, and both its
    tokens and its factors are views. Else tiles of neighbouring rows gather the factors of all
    adapters that answer in them, and a mask parts these.
    """

    count: int
    ranks: slice | Tensor
    """The stack's rows that the tiles use, in their order: (G W)."""
    mask_GWn1: Tensor | None
    """1 where a tile's factor (W) is that of its row (n), over the tokens of a row; or None."""

    def _factors(self, F_SD: Tensor) -> Tensor:
        if isinstance(self.ranks, slice):
            return F_SD[self.ranks].view(self.count, -1, F_SD.shape[-1])
        return F_SD.index_select(0, self.ranks).view(self.count, -1, F_SD.shape[-1])

    def _tokens(self, x_MTD: Tensor) -> Tensor:
        return x_MTD.reshape(self.count, -1, x_MTD.shape[-1])

    def shrink(self, x_MTD: Tensor, F_SD: Tensor) -> Tensor:
        # Factors first: as bfloat16 this is up to twice as fast as tokens first (docs/log.md).
        hidden_GWn = torch.bmm(self._factors(F_SD), self._tokens(x_MTD).transpose(1, 2))
        if self.mask_GWn1 is not None:
            by_row = hidden_GWn.view(*self.mask_GWn1.shape[:3], -1)
            by_row.mul_(self.mask_GWn1)
        return hidden_GWn

    def expand_(self, y_MTD: Tensor, hidden: Tensor, F_SD: Tensor) -> None:
        # The output has to be row-major: into a transposed one torch's bfloat16 product is a plain
        # loop, a thousand times slower.
        y_GnD = y_MTD.view(self.count, -1, y_MTD.shape[-1])
        y_GnD.baddbmm_(hidden.transpose(1, 2), self._factors(F_SD))

    def outer(self, hidden: Tensor, x_MTD: Tensor, ranks: int) -> Tensor:
        found_SD = torch.bmm(hidden, self._tokens(x_MTD)).flatten(0, 1)
        gradient_SD = found_SD.new_zeros(ranks, found_SD.shape[-1])
        if isinstance(self.ranks, slice):
            gradient_SD[self.ranks] = found_SD
            return gradient_SD
        return gradient_SD.index_add_(0, self.ranks, found_SD)


@dataclass(frozen=True)
class _Rows:
    """The answered rows by slot: what the three forms are weighed on."""

    batch: int
    order: tuple[int, ...]
    """Their positions, sorted by slot."""
    slots: tuple[int, ...]
    """The slot of each, ascending."""
    starts: tuple[int, ...]
    tokens: int
    width: int

    @property
    def together(self) -> bool:
        return self.order == tuple(range(self.order[0], self.order[0] + len(self.order)))

    def groups(self) -> list[tuple[int, int, int]]:
        """(slot, first, stop) of each slot's rows, counted within `order`."""
        edges = [i for i, s in enumerate(self.slots) if i == 0 or s != self.slots[i - 1]]
        ends = [*edges[1:], len(self.slots)]
        return [(self.slots[a], a, b) for a, b in zip(edges, ends, strict=True)]

    def rank(self, slot: int) -> int:
        return self.starts[slot + 1] - self.starts[slot]

    def work(self, rows: int, columns: float) -> float:
        """Seconds of a product of that many columns for every token of the rows."""
        return rows * self.tokens * columns * self.width / RATE

    def sorting(self) -> float:
        """Seconds to bring the rows into order and back, if they are not."""
        moved = len(self.order) * self.tokens * self.width
        return 0.0 if self.together else 3 * CALL + 2 * moved / COPY


def plan_rows(
    slots: Sequence[int], starts: tuple[int, ...], *, like: Tensor, tokens: int = 1, width: int
) -> RowPlan | None:
    """The cheapest way to multiply rows of these slots (-1: the base's), or None for no product.

    `starts` are the stack's; `tokens` stand in each row; `width` is I + O; `like` gives the masks'
    dtype and device. What is weighed: the operators that are called, the multiply-adds of all
    columns (those masked away too), and what must be gathered.
    """
    answered = [
        (slot, row)
        for row, slot in enumerate(slots)
        if slot >= 0 and starts[slot + 1] > starts[slot]
    ]
    if not answered:
        return None
    answered.sort()
    found = _Rows(
        batch=len(slots),
        order=tuple(row for _, row in answered),
        slots=tuple(slot for slot, _ in answered),
        starts=starts,
        tokens=tokens,
        width=width,
    )
    groups = found.groups()
    own = sum((b - a) * found.rank(slot) for slot, a, b in groups)
    masked = 3 * CALL + found.work(len(slots), starts[-1])
    slices = 2 * CALL * len(groups) + found.work(1, own) + found.sorting()
    if _even(found, groups):
        tiles = 2 * CALL + found.work(1, own) + found.sorting()
        size = groups[0][2] - groups[0][1]
    else:
        tiles, size = min((_tiled_cost(found, n), n) for n in _sizes(len(found.order)))
    best = min(masked, slices, tiles)
    # One adapter on a slice of rows is a tile, and a slice: two plain products are the simplest.
    if slices == best or len(groups) == 1:
        return _slices(found, groups, like)
    if tiles == best:
        return (
            _even_tiles(found, groups, like) if _even(found, groups) else _tiles(found, size, like)
        )
    return Masked(slice(0, len(slots)), None, _mask(slots, starts, like))


def _even(found: _Rows, groups: list[tuple[int, int, int]]) -> bool:
    """Whether each slot has as many rows and ranks as the next, and its ranks follow on."""
    first, a, b = groups[0]
    follow = all(
        found.starts[slot] == found.starts[before + 1]
        for (before, _, _), (slot, _, _) in pairwise(groups)
    )
    return follow and all(
        stop - start == b - a and found.rank(slot) == found.rank(first)
        for slot, start, stop in groups
    )


def _sizes(rows: int) -> list[int]:
    return [2**power for power in range(rows.bit_length())]


def _tile_ranks(found: _Rows, size: int) -> list[list[int]]:
    """For each tile of that many rows, the stack's rows of all adapters that answer in it."""
    tiles = []
    for first in range(0, len(found.slots), size):
        used = dict.fromkeys(found.slots[first : first + size])
        tiles.append(
            [r for slot in used for r in range(found.starts[slot], found.starts[slot + 1])]
        )
    return tiles


def _tiled_cost(found: _Rows, size: int) -> float:
    tiles = _tile_ranks(found, size)
    columns = max(len(ranks) for ranks in tiles)
    gathered = len(tiles) * columns * found.width
    padded = 0.0 if len(found.slots) % size == 0 or not found.together else 3 * CALL
    work = found.work(len(tiles) * size, columns)
    return 5 * CALL + padded + work + 2 * gathered / COPY + found.sorting()


def _positions(found: _Rows, like: Tensor, padded: int) -> tuple[slice | Tensor, Tensor | None]:
    if found.together and padded == len(found.order):
        return slice(found.order[0], found.order[-1] + 1), None
    real = torch.tensor(found.order, device=like.device)
    filler = [found.order[0]] * (padded - len(found.order))
    return torch.tensor([*found.order, *filler], device=like.device), real


def _slices(found: _Rows, groups: list[tuple[int, int, int]], like: Tensor) -> Slices:
    parts = tuple(
        (slice(a, b), slice(found.starts[slot], found.starts[slot + 1])) for slot, a, b in groups
    )
    return Slices(*_positions(found, like, len(found.order)), parts)


def _even_tiles(found: _Rows, groups: list[tuple[int, int, int]], like: Tensor) -> Tiles:
    first, last = groups[0][0], groups[-1][0]
    ranks = slice(found.starts[first], found.starts[last + 1])
    return Tiles(*_positions(found, like, len(found.order)), len(groups), ranks, None)


def _tiles(found: _Rows, size: int, like: Tensor) -> Tiles:
    tiles = _tile_ranks(found, size)
    columns = max(len(ranks) for ranks in tiles)
    owner = [slot for slot in range(len(found.starts) - 1) for _ in range(found.rank(slot))]
    mask = torch.zeros(len(tiles), columns, size)
    for number, ranks in enumerate(tiles):
        slots = found.slots[number * size : (number + 1) * size]
        owners = torch.tensor([owner[rank] for rank in ranks])
        mask[number, : len(ranks), : len(slots)] = (owners[:, None] == torch.tensor(slots)).float()
    index = [rank for ranks in tiles for rank in (*ranks, *[ranks[0]] * (columns - len(ranks)))]
    return Tiles(
        *_positions(found, like, len(tiles) * size),
        len(tiles),
        torch.tensor(index, device=like.device),
        mask.to(like)[..., None],
    )


def _mask(slots: Sequence[int], starts: tuple[int, ...], like: Tensor) -> Tensor:
    """(B, 1, S): 1 where a row's own ranks are."""
    mask_BS = torch.zeros(len(slots), starts[-1])
    for row, slot in enumerate(slots):
        if slot >= 0:
            mask_BS[row, starts[slot] : starts[slot + 1]] = 1.0
    return mask_BS.to(like)[:, None]
