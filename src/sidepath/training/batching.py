"""Examples, and the batches they become: padded, or packed several to a row.

Dimensions: B rows of a batch, T tokens of its longest row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sidepath.data.example import Example

T = TypeVar("T")

IGNORED = -100
"""The target of a token that is not supervised."""
Bin = tuple[int, ...]
"""Rows of the data that stand behind one another in one row of a batch; one row unless packed."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows padded on the right to the longest of them; each holds one example, or several.

    Where rows are packed, `positions_BT` restarts at 0 with each example and there is no
    attention mask: transformers reads from the positions which tokens belong together.
    """

    ids_BT: Tensor
    """Token ids, int64."""
    attention_mask_BT: Tensor | None
    """1 for tokens, 0 for padding, int64; None for packed rows."""
    positions_BT: Tensor | None
    """Each token's position in its example, int64, 0 for padding; None unless packed."""
    targets_BT: Tensor
    """Token ids where supervised, else `IGNORED`; not shifted."""
    labels_B: Tensor | None
    """Class ids for classification, None for causal rows."""
    rows: tuple[int, ...]
    """Positions of the rows in `Data.examples`, in order."""
    tokens: int
    """Tokens, padding not counted."""
    weight: int
    """What the loss is divided by: targets that can be predicted, or rows for classification."""

    @property
    def first_target(self) -> int:
        """The first column, of all but the first, that holds a target; T - 1 when none does."""
        columns_T = (self.targets_BT[:, 1:] != IGNORED).any(dim=0).nonzero()
        return int(columns_T[0]) if len(columns_T) else self.targets_BT.shape[1] - 1

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)


def collate(examples: Sequence[Example], rows: Sequence[int], pad_id: int) -> Batch:
    """The padded batch of these examples, in the order given; `rows` says which they are."""
    arrays = _Arrays(len(examples), max(len(example.ids_T) for example in examples), pad_id)
    mask_BT = np.zeros_like(arrays.ids_BT)
    for row, example in enumerate(examples):
        arrays.put(row, 0, example)
        mask_BT[row, : len(example.ids_T)] = 1
    labels = [example.label for example in examples if example.label is not None]
    return Batch(
        torch.from_numpy(arrays.ids_BT),
        torch.from_numpy(mask_BT),
        None,
        torch.from_numpy(arrays.targets_BT),
        torch.tensor(labels) if labels else None,
        tuple(rows),
        int(mask_BT.sum()),
        len(labels) or arrays.weight(),
    )


def collate_packed(bins: Sequence[Sequence[Example]], rows: Sequence[int], pad_id: int) -> Batch:
    """The batch with one row for each bin, its examples behind one another.

    The first token of an example is never a target, so none is predicted from the example
    before it.
    """
    longest = max(sum(len(example.ids_T) for example in bin_) for bin_ in bins)
    arrays = _Arrays(len(bins), longest, pad_id)
    positions_BT = np.zeros_like(arrays.ids_BT)
    tokens = 0
    for row, bin_ in enumerate(bins):
        start = 0
        for example in bin_:
            arrays.put(row, start, example)
            stop = start + len(example.ids_T)
            positions_BT[row, start:stop] = np.arange(stop - start)
            start = stop
        tokens += start
    return Batch(
        torch.from_numpy(arrays.ids_BT),
        None,
        torch.from_numpy(positions_BT),
        torch.from_numpy(arrays.targets_BT),
        None,
        tuple(rows),
        tokens,
        arrays.weight(),
    )


class _Arrays:
    """Ids and targets of a batch while it is filled."""

    def __init__(self, rows: int, tokens: int, pad_id: int) -> None:
        self.ids_BT = np.full((rows, tokens), pad_id, dtype=np.int64)
        self.targets_BT = np.full((rows, tokens), IGNORED, dtype=np.int64)

    def put(self, row: int, start: int, example: Example) -> None:
        """Write an example into a row, from the column `start` on."""
        place = slice(start, start + len(example.ids_T))
        self.ids_BT[row, place] = example.ids_T
        self.targets_BT[row, place] = np.where(example.supervised_T, example.ids_T, IGNORED)

    def weight(self) -> int:
        """Targets with a token before them."""
        return int((self.targets_BT[:, 1:] != IGNORED).sum())


def in_passes(items: Sequence[T], size: int) -> Iterator[list[T]]:
    """A step's items as forward passes of at most `size` of them."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """All rows, longest first (a batch too large for memory fails at once), in batches."""
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    return list(in_passes(order, batch_size))
