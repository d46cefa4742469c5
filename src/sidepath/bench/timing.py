"""Timing: ways of doing one thing, taken in turn in one process; medians, and ratios of neighbours.

Nothing here knows what is timed. What slows the machine for a while slows all ways alike, so a
ratio of neighbouring runs says more than two medians do.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Action = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """The middle of some measurements, with the smallest and the largest."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


class Clock:
    """Times actions on one device, and keeps the most memory that each way needed on a GPU.

    On CUDA the time is that between two events around the action's kernels, read after the
    device has done all of them; the memory is `torch.cuda.max_memory_allocated`, everything
    that is resident included. On a CPU it is the wall's clock and no memory is read.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self.peak_bytes: dict[str, int] = {}
        """The most bytes allocated during each way's action; empty on a CPU."""

    def seconds(self, name: str, action: Action) -> float:
        """Seconds that one call of the action takes."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            action()
            return time.perf_counter() - began
        return self._seconds_on_gpu(name, action)

    def _seconds_on_gpu(self, name: str, action: Action) -> float:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        event: Any = torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        action()
        end.record()
        torch.cuda.synchronize(self.device)
        peak = int(torch.cuda.max_memory_allocated(self.device))
        self.peak_bytes[name] = max(peak, self.peak_bytes.get(name, 0))
        return float(start.elapsed_time(end)) / 1000


def interleaved(
    actions: Mapping[str, Action],
    *,
    rounds: int,
    warmup: int = 2,
    before: Mapping[str, Action] | None = None,
    after: Mapping[str, Action] | None = None,
    clock: Clock | None = None,
) -> dict[str, list[float]]:
    """Seconds of each action, A B C A B C ...: `rounds` of each, after `warmup` that do not count.

    `before` and `after` hold what is done around each call of an action without being timed.
    """
    before, after, clock = before or {}, after or {}, clock or Clock()
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    gc.collect()
    for number in range(warmup + rounds):
        for name, action in actions.items():
            before.get(name, _nothing)()
            spent = clock.seconds(name, action)
            after.get(name, _nothing)()
            if number >= warmup:
                seconds[name].append(spent)
    return seconds


def quotients(one: Sequence[float], other: Sequence[float]) -> Spread:
    """`one / other` for each pair of neighbouring runs."""
    return Spread.of([a / b for a, b in zip(one, other, strict=True)])


def ratios(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """`quotients` as a mapping: median, min, max."""
    return vars(quotients(one, other)).copy()


@contextmanager
def pinned_threads(count: int) -> Iterator[None]:
    """Within the block torch computes with this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _nothing() -> None:
    """Where nothing is to be done before or after an action."""
