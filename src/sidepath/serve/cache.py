"""Keys and values of the running requests: one row each, allocated once (floor 5).

A `transformers` cache whose rows are claimed and released one by one. Each row has its own length;
a call names the rows it is about (`select`), writes their new keys and values where they belong,
and reads their past as a view up to the longest of them: nothing is concatenated, and nothing is
copied as long as the rows lie together. Rows that run are kept together at the front: when one is
released, the last takes its place.

A row is zero wherever nothing was written, and again once it is released: what a request leaves
behind, be it NaN, never reaches the next. Behind the rows of requests are some that can be filled
from these and copied to them (`prefixes.py`).

Every layer keeps the whole past, those with a window too; what a token may see is the masks'
business (`masks.py`).

Dimensions: R rows, H key and value heads, C context, D features of a head; B rows of a call, T its
tokens, L longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(frozen=True)
class Selected:
    """The rows of one call, and where their new tokens stand."""

    rows: slice | Tensor
    """A slice where they lie together in order; else their numbers (B,)."""
    rows_B1: Tensor
    positions_BT: Tensor
    past: int
    """Tokens that the longest row has already."""
    longest: int
    """The same with its new ones."""
    span: tuple[int, int] | None
    """The positions as a slice, where they are the same in all rows."""


class RowsLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values (R, H, C, D); they are allocated when the first ones come."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, rows: int, context: int) -> None:
        super().__init__()
        self.rows, self.context = rows, context
        self.selected: Selected | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate; memory that was never written takes no room on a CPU."""
        self.keys = self._zeros(key_states)
        self.values = self._zeros(value_states)
        self.is_initialized = True

    def _zeros(self, states_BHTD: Tensor) -> Tensor:
        heads, width = states_BHTD.shape[1], states_BHTD.shape[3]
        return states_BHTD.new_zeros(self.rows, heads, self.context, width)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the selected rows' new keys and values; returns theirs (B, H, L, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.selected is not None
        return (
            _written(self.keys, key_states, self.selected),
            _written(self.values, value_states, self.selected),
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what `update` gives."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens that the longest selected row has already."""
        return 0 if self.selected is None else self.selected.past

    def get_max_length(self) -> int:
        """The context."""
        return self.context

    def move(self, source: int, target: int, tokens: int) -> None:
        """Let one row's tokens stand in another."""
        if self.is_initialized:
            for kept in (self.keys, self.values):
                kept[target, :, :tokens] = kept[source, :, :tokens]

    def clear(self, row: int, tokens: int) -> None:
        """Make a row zero again."""
        if self.is_initialized:
            for kept in (self.keys, self.values):
                kept[row, :, :tokens] = 0


def _written(kept_RHCD: Tensor, new_BHTD: Tensor, at: Selected) -> Tensor:
    if at.span is not None and isinstance(at.rows, slice):
        kept_RHCD[at.rows, :, at.span[0] : at.span[1]] = new_BHTD
    else:
        kept_RHCD[at.rows_B1, :, at.positions_BT] = new_BHTD.transpose(1, 2)
    past = kept_RHCD[:, :, : at.longest]
    return past[at.rows] if isinstance(at.rows, slice) else past.index_select(0, at.rows)


class RowsCache(Cache):  # type: ignore[misc]
    """The cache of a model's layers, by rows. Holds `2 x layers x H x D` numbers a token."""

    layers: list[RowsLayer]

    def __init__(
        self,
        layers: int,
        rows: int,
        context: int,
        device: torch.device | None = None,
        kept: int = 0,
    ) -> None:
        super().__init__(layers=[RowsLayer(rows + kept, context) for _ in range(layers)])
        self.rows, self.context, self.device = rows, context, device
        self.kept_rows = range(rows, rows + kept)
        """Those that belong to no request."""
        self._owners: list[int] = []
        """Whose each row is: rows are taken from the front."""
        self._lengths = [0] * (rows + kept)
        """Tokens that may have been written in each row."""

    @property
    def taken(self) -> int:
        """How many rows are claimed."""
        return len(self._owners)

    def claim(self, owner: int) -> None:
        """Give a request a row. There must be a free one, and it must have none."""
        assert len(self._owners) < self.rows
        assert owner not in self._owners
        self._owners.append(owner)

    def release(self, owner: int) -> None:
        """Take a request's row back; nothing of what was in it stays."""
        row, last = self._owners.index(owner), len(self._owners) - 1
        for layer in self.layers:
            if row != last:  # zeros are moved too, where the last one is shorter
                layer.move(last, row, max(self._lengths[row], self._lengths[last]))
            layer.clear(last, self._lengths[last])
        self._owners[row], self._lengths[row] = self._owners[last], self._lengths[last]
        self._lengths[last] = 0
        del self._owners[last]

    def length(self, owner: int) -> int:
        """Tokens that were written of a request."""
        return self._lengths[self._owners.index(owner)]

    def written(self, row: int) -> int:
        """Tokens that were written in a row."""
        return self._lengths[row]

    def copy(self, source: int, owner: int, tokens: int) -> None:
        """Let a row's first tokens be a request's too, which has none yet."""
        self._copy(source, self._owners.index(owner), tokens)

    def keep(self, owner: int, row: int) -> None:
        """Let a row that belongs to no request hold a request's tokens."""
        self.clear(row)
        self._copy(self._owners.index(owner), row, self.length(owner))

    def clear(self, row: int) -> None:
        """Make a row that belongs to no request zero again."""
        assert row in self.kept_rows
        for layer in self.layers:
            layer.clear(row, self._lengths[row])
        self._lengths[row] = 0

    def _copy(self, source: int, target: int, tokens: int) -> None:
        assert self._lengths[target] == 0
        for layer in self.layers:
            layer.move(source, target, tokens)
        self._lengths[target] = tokens

    def row_of(self, owner: int) -> int:
        """Where a request's tokens stand just now. A call is cheapest with rows in this order."""
        return self._owners.index(owner)

    def select(self, owners: Sequence[int], starts: Sequence[int], tokens: int) -> Tensor:
        """Say what the next call of the model is about: `tokens` new ones of each request, from
        position `starts[i]` on, in the order of the batch. Returns the positions (B, T).
        """
        rows = [self._owners.index(owner) for owner in owners]
        for row, start in zip(rows, starts, strict=True):
            self._lengths[row] = max(self._lengths[row], start + tokens)
        together = rows == list(range(rows[0], rows[0] + len(rows)))
        rows_B = torch.tensor(rows, device=self.device)
        new_T = torch.arange(tokens, device=self.device)
        positions_BT = torch.tensor(starts, device=self.device)[:, None] + new_T
        selected = Selected(
            rows=slice(rows[0], rows[0] + len(rows)) if together else rows_B,
            rows_B1=rows_B[:, None],
            positions_BT=positions_BT,
            past=max(starts),
            longest=max(starts) + tokens,
            span=(starts[0], starts[0] + tokens) if len(set(starts)) == 1 else None,
        )
        for layer in self.layers:
            layer.selected = selected
        return positions_BT
