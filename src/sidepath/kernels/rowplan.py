"""How a routed batch is multiplied with its adapters' factors: weighed, and decided once.

A plan is made for a batch's rows and used by every layer whose stack has the same ranks.

Dimensions: B rows, T tokens a row, S sum of the ranks, G tiles, W ranks of a tile, n its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sidepath.kernels.rowforms import Masked, RowPlan, Slices, Tiles

CALL = 8e-6
"""Seconds that an operator costs whatever its size."""
SLICED = 18e-6
"""The same for a product of one adapter's slice, with the views it is made of."""
RATE = 100e9
"""Multiply-adds a second of a product of some tens of columns."""
COPY = 4e9
"""Numbers a second that are brought into another order."""
KEPT = 0.25
"""Share of the gathering of factors that a pass pays: they are kept while a batch comes again."""
# Fitted to 68 cases on two cores (docs/log.md): with these the form chosen takes 1.3 % longer than
# the fastest of the three on average, and 19 % at most; float32 and bfloat16 alike.


@dataclass(frozen=True)
class Answered:
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

    @property
    def even(self) -> bool:
        """Whether each slot has as many rows and ranks as the next, and its ranks follow on."""
        groups = self.groups()
        slot, first, stop = groups[0]
        alike = all(
            b - a == stop - first and self.rank(other) == self.rank(slot) for other, a, b in groups
        )
        return alike and all(
            self.starts[other] == self.starts[before + 1]
            for (before, _, _), (other, _, _) in pairwise(groups)
        )

    def rank(self, slot: int) -> int:
        return self.starts[slot + 1] - self.starts[slot]

    def sizes(self) -> list[int]:
        """Rows that a tile may have, where adapters differ."""
        return [2**power for power in range(len(self.order).bit_length())]

    def tile_ranks(self, size: int) -> list[list[int]]:
        """For each tile of that many rows, the stack's rows of all adapters that answer in it."""
        tiles = []
        for first in range(0, len(self.slots), size):
            used = dict.fromkeys(self.slots[first : first + size])
            tiles.append(
                [rank for slot in used for rank in range(self.starts[slot], self.starts[slot + 1])]
            )
        return tiles

    def tiled(self, size: int) -> float:
        """Seconds of tiles of that many rows that gather their factors."""
        firsts = range(0, len(self.slots), size)
        columns = max(sum(map(self.rank, set(self.slots[i : i + size]))) for i in firsts)
        padded = len(firsts) * size > len(self.order) and self.together
        work = self.work(len(firsts) * size, columns)
        gathered = 2 * KEPT * len(firsts) * columns * self.width / COPY
        return 3 * CALL + work + gathered + (self.moving() if padded else self.sorting())

    def work(self, rows: int, columns: float) -> float:
        """Seconds of a product of that many columns for every token of the rows."""
        return rows * self.tokens * columns * self.width / RATE

    def sorting(self) -> float:
        """Seconds to bring the rows into order and back, if they are not."""
        return 0.0 if self.together else self.moving()

    def moving(self) -> float:
        """Seconds to take the rows out of the batch and to write them back."""
        return 3 * CALL + 2 * len(self.order) * self.tokens * self.width / COPY


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
    found = Answered(
        batch=len(slots),
        order=tuple(row for _, row in answered),
        slots=tuple(slot for slot, _ in answered),
        starts=starts,
        tokens=tokens,
        width=width,
    )
    groups = found.groups()
    weighed = costs(found)
    best = min(weighed, key=weighed.__getitem__)
    if best == "masked":
        return Masked(None, None, _mask(slots, starts, like))
    if best == "slices":
        return _slices(found, groups, like)
    return _even_tiles(found, groups, like) if found.even else _tiles(found, like)


def costs(found: Answered) -> dict[str, float]:
    """Seconds that each form would take, as far as the constants above tell."""
    groups = found.groups()
    own = found.work(sum((b - a) * found.rank(slot) for slot, a, b in groups), 1)
    if found.even:
        tiles = 2 * CALL + own + found.sorting()
    else:
        tiles = min(map(found.tiled, found.sizes()))
    return {
        "slices": 2 * SLICED * len(groups) + own + found.sorting(),
        "tiles": tiles,
        "masked": 3 * CALL + found.work(found.batch, found.starts[-1]),
    }


def _positions(
    found: Answered, like: Tensor, padded: int
) -> tuple[slice | Tensor | None, Tensor | None]:
    if found.order == tuple(range(found.batch)) and padded == found.batch:
        return None, None
    if found.together and padded == len(found.order):
        return slice(found.order[0], found.order[-1] + 1), None
    real = torch.tensor(found.order, device=like.device)
    filler = [found.order[0]] * (padded - len(found.order))
    return torch.tensor([*found.order, *filler], device=like.device), real


def _slices(found: Answered, groups: list[tuple[int, int, int]], like: Tensor) -> Slices:
    parts = tuple(
        (slice(a, b), slice(found.starts[slot], found.starts[slot + 1])) for slot, a, b in groups
    )
    return Slices(*_positions(found, like, len(found.order)), parts)


def _even_tiles(found: Answered, groups: list[tuple[int, int, int]], like: Tensor) -> Tiles:
    first, last = groups[0][0], groups[-1][0]
    ranks = slice(found.starts[first], found.starts[last + 1])
    return Tiles(*_positions(found, like, len(found.order)), len(groups), ranks, None)


def _tiles(found: Answered, like: Tensor) -> Tiles:
    size = min(found.sizes(), key=found.tiled)
    tiles = found.tile_ranks(size)
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
