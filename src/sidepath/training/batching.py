"""Examples, the order they are seen in, and the padded batches they become.

Dimensions: B rows of a batch, T tokens of its longest row, N targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORED = -100
"""The target of a token that is not supervised."""
WINDOW = 8
"""Optimiser steps whose rows are sorted by length together; see `step_groups`."""


@dataclass(frozen=True, eq=False)
class Example:
    """One row as tokens."""

    ids_T: NDArray[np.int64]
    """Token ids."""
    supervised_T: NDArray[np.bool_]
    """Which tokens are targets; all False for classification."""
    line: int
    """Where the row stands in its source."""
    prompt_length: int = 0
    """Tokens before the last completion: what generation starts from."""
    reference: str | None = None
    """The last completion as text; None where there is nothing to compare with."""
    label: int | None = None
    """Class id, for classification."""
    truncated: bool = False
    """The row was cut to `max_tokens`."""
    ends: bool = False
    """The row's last target is an end token."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows padded on the right to the longest of them."""

    ids_BT: Tensor
    """Token ids, int64."""
    attention_mask_BT: Tensor
    """1 for tokens, 0 for padding, int64."""
    targets_BT: Tensor
    """Token ids where supervised, else `IGNORED`; not shifted."""
    labels_B: Tensor | None
    """Class ids for classification, None for causal rows."""
    rows: tuple[int, ...]
    """Positions of the rows in `Data.examples`."""
    tokens: int
    """Tokens, padding not counted."""
    weight: int
    """What the loss is divided by: targets that can be predicted, or rows for classification."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        if device.type == "cpu":
            return self
        labels_B = None if self.labels_B is None else self.labels_B.to(device)
        return Batch(
            self.ids_BT.to(device),
            self.attention_mask_BT.to(device),
            self.targets_BT.to(device),
            labels_B,
            self.rows,
            self.tokens,
            self.weight,
        )


def collate(examples: Sequence[Example], rows: Sequence[int], pad_id: int) -> Batch:
    """The padded batch of `rows`, in the order given."""
    chosen = [examples[row] for row in rows]
    lengths = [len(example.ids_T) for example in chosen]
    ids_BT = np.full((len(chosen), max(lengths)), pad_id, dtype=np.int64)
    mask_BT = np.zeros_like(ids_BT)
    targets_BT = np.full_like(ids_BT, IGNORED)
    for row, (example, length) in enumerate(zip(chosen, lengths, strict=True)):
        ids_BT[row, :length] = example.ids_T
        mask_BT[row, :length] = 1
        targets_BT[row, :length] = np.where(example.supervised_T, example.ids_T, IGNORED)
    labels = [example.label for example in chosen if example.label is not None]
    return Batch(
        torch.from_numpy(ids_BT),
        torch.from_numpy(mask_BT),
        torch.from_numpy(targets_BT),
        torch.tensor(labels) if labels else None,
        tuple(rows),
        sum(lengths),
        len(labels) or int((targets_BT[:, 1:] != IGNORED).sum()),
    )


def step_groups(lengths: Sequence[int], size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """The rows of each optimiser step of an epoch; every row stands in exactly one step.

    The rows are shuffled, sorted by length within windows of `WINDOW` steps (so that a step
    holds rows of like length and little padding), cut into steps of `size` rows, and the steps
    are shuffled. The order depends on the lengths, `size`, `seed` and `epoch` alone: how a
    step is split into forward passes changes nothing.
    """
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    order = generator.permutation(len(lengths))
    by_row = np.asarray(lengths)
    span = WINDOW * size
    windows = [order[start : start + span] for start in range(0, len(order), span)]
    ranked = [window[np.argsort(by_row[window], kind="stable")] for window in windows]
    groups = [
        window[start : start + size] for window in ranked for start in range(0, len(window), size)
    ]
    return [groups[at].tolist() for at in generator.permutation(len(groups))]


def split_step(group: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """A step's rows as forward passes of at most `batch_size` rows."""
    for start in range(0, len(group), batch_size):
        yield list(group[start : start + batch_size])


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """All rows, longest first (a batch too large for memory fails at once), in batches."""
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    return list(split_step(order, batch_size))
