"""Three forms of the product of a routed batch with the stacked factors of its adapters.

Each form knows how to *take* its rows out of a batch, *shrink* them to their adapters' ranks,
*expand* those onto an output in place, and make the *outer* product that is a factor's gradient.
`rowplan.py` chooses between them.

Dimensions: B rows, M rows taken, T tokens a row, D in or out, S sum of the ranks, G tiles,
W ranks of a tile, n tokens of a tile.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RowPlan(ABC):
    """The rows that some adapter answers, in the order of their slots, and a way to multiply."""

    rows: slice | Tensor | None
    """A slice where they lie together in that order, None for all rows as they are; else their
    positions, padded at the end."""
    real: Tensor | None
    """The positions without the padding, where `rows` are positions."""

    def take(self, x_BTD: Tensor) -> Tensor:
        """The plan's rows (M, T, D): a view where they are a slice."""
        if self.rows is None:
            return x_BTD
        if isinstance(self.rows, slice):
            return x_BTD[self.rows]
        return x_BTD.index_select(0, self.rows)

    def put_(self, y_BTD: Tensor, part_MTD: Tensor) -> None:
        """Write back what `take` gave, changed. In place; nothing to do for a view."""
        if self.real is not None:
            y_BTD.index_copy_(0, self.real, part_MTD[: len(self.real)])

    def arrange(self, F_SD: Tensor) -> Tensor:
        """A stack of factors as `shrink` and `expand_` take it: a view, or a gathered copy."""
        return F_SD

    @abstractmethod
    def shrink(self, x_MTD: Tensor, factors: Tensor) -> Any:
        """Each token's products with its own adapter's rows of the arranged factors."""

    @abstractmethod
    def expand_(self, y_MTD: Tensor, hidden: Any, factors: Tensor) -> None:
        """Add what `shrink` gave, times each adapter's rows of the factors, to `y`. In place."""

    @abstractmethod
    def outer(self, hidden: Any, x_MTD: Tensor, ranks: int) -> Tensor:
        """The gradient (S, D) of a stack of factors: sums of hidden x over each one's tokens."""


@dataclass(frozen=True)
class Masked(RowPlan):
    """One product over all factors, then a mask: for few tokens or few columns."""

    mask_B1S: Tensor

    def shrink(self, x_MTD: Tensor, factors: Tensor) -> Tensor:
        hidden_MTS = F.linear(x_MTD.reshape(-1, x_MTD.shape[-1]), factors).view(
            *x_MTD.shape[:2], -1
        )
        return hidden_MTS.mul_(self.mask_B1S)

    def expand_(self, y_MTD: Tensor, hidden: Tensor, factors: Tensor) -> None:
        y_MTD.view(-1, y_MTD.shape[-1]).addmm_(hidden.flatten(0, 1), factors)

    def outer(self, hidden: Tensor, x_MTD: Tensor, ranks: int) -> Tensor:
        return hidden.flatten(0, 1).T @ x_MTD.reshape(-1, x_MTD.shape[-1])


@dataclass(frozen=True)
class Slices(RowPlan):
    """Two products an adapter, on its own slice of the rows: for few adapters of many tokens."""

    parts: tuple[tuple[slice, slice], ...]
    """The rows taken and the ranks, of each adapter."""

    def shrink(self, x_MTD: Tensor, factors: Tensor) -> list[Tensor]:
        columns = x_MTD.shape[-1]
        return [
            F.linear(x_MTD[rows].reshape(-1, columns), factors[ranks]) for rows, ranks in self.parts
        ]

    def expand_(self, y_MTD: Tensor, hidden: list[Tensor], factors: Tensor) -> None:
        for (rows, ranks), hidden_NR in zip(self.parts, hidden, strict=True):
            y_MTD[rows].view(-1, y_MTD.shape[-1]).addmm_(hidden_NR, factors[ranks])

    def outer(self, hidden: list[Tensor], x_MTD: Tensor, ranks: int) -> Tensor:
        gradient_SD = x_MTD.new_zeros(ranks, x_MTD.shape[-1])
        for (rows, own), hidden_NR in zip(self.parts, hidden, strict=True):
            x_ND = x_MTD[rows].reshape(-1, x_MTD.shape[-1])
            gradient_SD[own].addmm_(hidden_NR.T, x_ND)
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

    def arrange(self, F_SD: Tensor) -> Tensor:
        """Each tile's factors (G, W, D)."""
        if isinstance(self.ranks, slice):
            return F_SD[self.ranks].view(self.count, -1, F_SD.shape[-1])
        return F_SD.index_select(0, self.ranks).view(self.count, -1, F_SD.shape[-1])

    def _tokens(self, x_MTD: Tensor) -> Tensor:
        return x_MTD.reshape(self.count, -1, x_MTD.shape[-1])

    def shrink(self, x_MTD: Tensor, factors: Tensor) -> Tensor:
        # Factors first: as bfloat16 this is up to twice as fast as tokens first (docs/log.md).
        hidden_GWn = torch.bmm(factors, self._tokens(x_MTD).transpose(1, 2))
        if self.mask_GWn1 is not None:
            by_row = hidden_GWn.view(*self.mask_GWn1.shape[:3], -1)
            by_row.mul_(self.mask_GWn1)
        return hidden_GWn

    def expand_(self, y_MTD: Tensor, hidden: Tensor, factors: Tensor) -> None:
        # The output has to be row-major: into a transposed one torch's bfloat16 product is a plain
        # loop, a thousand times slower.
        y_GnD = y_MTD.view(self.count, -1, y_MTD.shape[-1])
        y_GnD.baddbmm_(hidden.transpose(1, 2), factors)

    def outer(self, hidden: Tensor, x_MTD: Tensor, ranks: int) -> Tensor:
        found_SD = torch.bmm(hidden, self._tokens(x_MTD)).flatten(0, 1)
        gradient_SD = found_SD.new_zeros(ranks, found_SD.shape[-1])
        if isinstance(self.ranks, slice):
            gradient_SD[self.ranks] = found_SD
            return gradient_SD
        return gradient_SD.index_add_(0, self.ranks, found_SD)
