"""Vectors of every row, or of every token of every row, in memory-mapped files.

Dimensions: B rows, T tokens of a batch's longest row, D numbers of a vector (in `raw_`: bytes).
"""

from __future__ import annotations

import os
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Column(ABC):
    """One output of a model for all rows: (B, T, D) of a batch, or (B, D)."""

    bytes = 0
    """Taken on disk."""

    def __init__(self, like: Tensor) -> None:
        """`like`: that output for some batch."""
        self.dtype, self.width, self.by_token = like.dtype, like.shape[-1], like.dim() == 3

    @abstractmethod
    def put(self, rows: Sequence[int], output: Tensor) -> None:
        """Keep the vectors of rows; what stands behind a row's own tokens is left out."""

    @abstractmethod
    def of(self, rows: Sequence[int], tokens: int) -> Tensor:
        """The output for rows, on the CPU, with zeros where a row is shorter than `tokens`."""


class Blank(Column):
    """An output that nobody reads: zeros in its shape, which take no memory."""

    def put(self, rows: Sequence[int], output: Tensor) -> None:
        pass

    def of(self, rows: Sequence[int], tokens: int) -> Tensor:
        between = (tokens,) if self.by_token else ()
        return torch.zeros((), dtype=self.dtype).expand(len(rows), *between, self.width)


class Stored(Column):
    """Vectors in a memory-mapped file, those of one row after those of another."""

    def __init__(self, like: Tensor, counts: NDArray[np.int64]) -> None:
        """`counts`: vectors of each row. Errors: `OSError` when there is no room for them."""
        super().__init__(like)
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        shape = (int(self._starts[-1]), self.width * self.dtype.itemsize)
        self.bytes = shape[0] * shape[1]
        # A file without a name: the mapping alone holds it, so that a killed run leaves nothing.
        with tempfile.TemporaryFile() as file:
            _reserve(file.fileno(), self.bytes)
            # Bytes, since NumPy has no bfloat16.
            self._vectors = np.memmap(file, np.uint8, "r+", shape=shape).view(np.ndarray)

    def put(self, rows: Sequence[int], output: Tensor) -> None:
        raw_BTD = output.detach().cpu().contiguous().view(torch.uint8).numpy()
        for raw_TD, row in zip(raw_BTD, rows, strict=True):
            place = self._vectors[self._starts[row] : self._starts[row + 1]]
            place[:] = raw_TD[: len(place)] if self.by_token else raw_TD

    def of(self, rows: Sequence[int], tokens: int) -> Tensor:
        count = tokens if self.by_token else 1
        raw_BTD = np.zeros((len(rows), count, self._vectors.shape[1]), dtype=np.uint8)
        for raw_TD, row in zip(raw_BTD, rows, strict=True):
            place = self._vectors[self._starts[row] : self._starts[row + 1]]
            raw_TD[: len(place)] = place
        found = torch.from_numpy(raw_BTD).view(self.dtype)
        return found if self.by_token else found[:, 0]


def _reserve(file: int, size: int) -> None:
    """Give an empty file that size; `OSError` where the disk has no room for it.

    Without it, a write into the mapping would end the process when the disk is full.
    """
    if sys.platform == "linux":
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)
