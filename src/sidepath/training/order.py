"""Which rows each optimiser step sees: a function of the data, the seed and the step alone.

Nothing here remembers what was drawn before, so a resumed run needs no more than the number of
its step, and neither accumulation nor the number of processes changes what a step holds.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sidepath.training.batching import Bin

Part = tuple[int, int, float]
"""Rows [start, stop) of the data and the weight they are drawn with."""
WINDOW = 8
"""Optimiser steps whose rows are sorted by length together."""
PACKED_TOGETHER = 4096
"""Rows among which packing looks for those that fill a row."""


class Order:
    """The steps of each epoch.

    An epoch draws as many rows as there are. A part with weight w gives the share w / sum(w)
    of them, to the nearest row, going through its own rows again and again, each time in a new
    order, and takes up in the next epoch where it stopped. Equal shares by size are the
    default: each row once an epoch.

    The rows are shuffled, sorted by length within windows of `WINDOW` steps (so that a step
    holds rows of like length and little padding), cut into steps of `size`, and the steps are
    shuffled. With `capacity` they are packed first, into bins of at most so many tokens (each
    window best fit, longest first), and a step is `size` bins.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        parts: Sequence[Part],
        *,
        size: int,
        seed: int,
        capacity: int | None = None,
    ) -> None:
        self.lengths = np.asarray(lengths)
        self._tokens: list[int] = self.lengths.tolist()  # plain integers add up ten times as fast
        self.parts = tuple(parts)
        self.shares = _shares(self.parts, len(self.lengths))
        self.size, self.seed, self.capacity = size, seed, capacity
        self._starts = [0]
        self._epoch: tuple[int, list[list[Bin]]] = (-1, [])

    def epoch(self, number: int) -> list[list[Bin]]:
        """The steps of one epoch (from 0), each as bins of rows."""
        if self._epoch[0] != number:
            self._epoch = (number, self._drawn(number))
        return self._epoch[1]

    def start_of(self, epoch: int) -> int:
        """Steps before an epoch; without packing every epoch has equally many."""
        if self.capacity is None:
            return epoch * math.ceil(len(self.lengths) / self.size)
        while len(self._starts) <= epoch:
            number = len(self._starts) - 1
            self._starts.append(self._starts[-1] + len(self.epoch(number)))
        return self._starts[epoch]

    def place(self, step: int) -> tuple[int, int]:
        """The epoch that a step (from 0) is in, and its position there."""
        if self.capacity is None:
            return divmod(step, self.start_of(1))
        while self._starts[-1] <= step:
            self.start_of(len(self._starts))
        epoch = bisect.bisect_right(self._starts, step) - 1
        return epoch, step - self._starts[epoch]

    def at(self, step: int) -> tuple[int, list[Bin]]:
        """The epoch of a step (from 0) and the bins it sees."""
        epoch, position = self.place(step)
        return epoch, self.epoch(epoch)[position]

    def largest(self, first: int, last: int) -> int:
        """Which of the steps [first, last) has the longest bin: the one that memory is for."""
        return max(range(first, last), key=self._longest, default=first)

    def _longest(self, step: int) -> int:
        return max(map(self._total, self.at(step)[1]))

    def _total(self, bin_: Bin) -> int:
        return sum(self._tokens[row] for row in bin_)

    def passes(self, steps: int) -> float:
        """Epochs that this many steps are."""
        epoch, position = self.place(steps)
        return epoch + position / (self.start_of(epoch + 1) - self.start_of(epoch))

    def steps_of(self, epochs: float) -> int:
        """Steps that this many epochs are, rounded up."""
        rest, whole = math.modf(epochs)
        start = self.start_of(int(whole))
        if rest == 0:
            return start
        steps = rest * (self.start_of(int(whole) + 1) - start)
        return start + math.ceil(round(steps, 9))  # 1.1 - 1 is a little more than a tenth

    def _drawn(self, epoch: int) -> list[list[Bin]]:
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        if len(self.parts) == 1:
            rows = generator.permutation(len(self.lengths))
        else:
            rows = generator.permutation(self._rows_of(epoch))
        if self.capacity is None:
            bins: list[Bin] = [(row,) for row in rows.tolist()]
        else:
            bins = pack(rows, self.lengths, self.capacity)
            bins = [bins[at] for at in generator.permutation(len(bins))]
        groups = self._cut(bins)
        return [groups[at] for at in generator.permutation(len(groups))]

    def _rows_of(self, epoch: int) -> NDArray[np.int64]:
        """The rows that the parts give to an epoch, part by part."""
        drawn = []
        for number, ((start, stop, _), share) in enumerate(
            zip(self.parts, self.shares, strict=True)
        ):
            count = stop - start
            first, last = epoch * share, (epoch + 1) * share
            for turn in range(first // count, -(-last // count)):
                generator = np.random.Generator(np.random.PCG64([self.seed, number, turn]))
                rows = generator.permutation(count) + start
                begin = max(first - turn * count, 0)
                drawn.append(rows[begin : min(last - turn * count, count)])
        return np.concatenate(drawn)

    def _cut(self, bins: list[Bin]) -> list[list[Bin]]:
        """Steps of `size` bins of like length, window by window."""
        span = WINDOW * self.size
        groups = []
        for start in range(0, len(bins), span):
            window = bins[start : start + span]
            totals = [self._total(bin_) for bin_ in window]
            ranked = [window[at] for at in np.argsort(totals, kind="stable")]
            groups += [ranked[at : at + self.size] for at in range(0, len(ranked), self.size)]
        return groups


def _shares(parts: Sequence[Part], rows: int) -> list[int]:
    """Rows each part gives to an epoch: `rows` in all, the largest remainders rounded up."""
    whole = sum(weight for _, _, weight in parts)
    exact = [rows * weight / whole for _, _, weight in parts]
    counts = [math.floor(value) for value in exact]
    by_rest = sorted(range(len(parts)), key=lambda at: counts[at] - exact[at])
    for at in by_rest[: rows - sum(counts)]:
        counts[at] += 1
    return counts


def pack(
    rows: Sequence[int] | NDArray[np.int64], lengths: NDArray[np.int64], capacity: int
) -> list[Bin]:
    """Bins of at most `capacity` tokens that hold each of `rows` once.

    Best fit, longest first, within windows of `PACKED_TOGETHER` rows: each row goes into the
    fullest bin that still has room for it. A row longer than `capacity` gets a bin of its own.
    """
    packed: list[Bin] = []
    for start in range(0, len(rows), PACKED_TOGETHER):
        window = np.asarray(rows[start : start + PACKED_TOGETHER])
        packed += _best_fit(window, lengths, capacity)
    return packed


def _best_fit(window: NDArray[np.int64], lengths: NDArray[np.int64], capacity: int) -> list[Bin]:
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    """(room left, bin) of each bin, ascending."""
    for row in window[np.argsort(-lengths[window], kind="stable")].tolist():
        length = int(lengths[row])
        at = bisect.bisect_left(rooms, (length, -1))
        if at == len(rooms):
            bins.append([row])
            bisect.insort(rooms, (max(0, capacity - length), len(bins) - 1))
        else:
            room, number = rooms.pop(at)
            bins[number].append(row)
            bisect.insort(rooms, (room - length, number))
    return [tuple(bin_) for bin_ in bins]
