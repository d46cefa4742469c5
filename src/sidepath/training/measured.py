"""The peak memory of a run, measured: what a plan's prediction is held against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from sidepath.store.live import LiveBytes, held_tensors
from sidepath.training.trained import device_of

T = TypeVar("T")
COUNTED_STEPS = 2
"""Steps counted on a CPU: AdamW's moments are there from the first one's end on."""
_END: Any = object()


@dataclass
class Peak:
    """Most bytes of tensors that were alive at once, the model's own included."""

    bytes: int = 0
    how: str = "nothing measured"
    """Where the figure comes from."""


@contextmanager
def peak_bytes(model: nn.Module) -> Iterator[Peak]:
    """Measure the block; the `Peak` is filled when it ends.

    On CUDA it is the allocator's own high-water mark (`torch.cuda.max_memory_allocated`, which
    is reset), and costs nothing. On a CPU every operator's results are counted, storage by
    storage (`LiveBytes`): about 10 us an operator (a quarter of a step of the embedded base),
    so measure a few steps and not a run. Buffers inside an operator's kernel are not seen; held
    against the CPU allocator's events they were under 2 % of a step. Changes no result.
    """
    peak, gauge = Peak(), _gauge(model)
    with gauge.running():
        yield peak
    peak.bytes, peak.how = gauge.read()


def watched(
    steps: Iterable[T],
    model: nn.Module,
    peak: Peak,
    *,
    first: int = COUNTED_STEPS,
    also: int | None = None,
) -> Iterator[T]:
    """The same steps one by one, measured into `peak`: all on CUDA; on a CPU the `first` few and
    number `also` (from 0), the one with the longest rows.

    Only the steps themselves are measured, not what the caller does between them.
    """
    gauge, iterator, number = _gauge(model), iter(steps), 0
    try:
        while True:
            if number < first or number == also or gauge.free:
                with gauge.running():
                    item = next(iterator, _END)
                peak.bytes, peak.how = gauge.read()
            else:
                item = next(iterator, _END)
            if item is _END:
                return
            number += 1
            yield item
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()  # the loop puts the model back when it is left early


class _Counter:
    """Counts on a CPU."""

    free = False

    def __init__(self, model: nn.Module) -> None:
        self.count = LiveBytes(held_tensors(model))

    @contextmanager
    def running(self) -> Iterator[None]:
        with self.count:
            yield

    def read(self) -> tuple[int, str]:
        return self.count.peak, "live tensors, counted operator by operator"


class _Allocator:
    """Reads CUDA's allocator."""

    free = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def running(self) -> Iterator[None]:
        yield

    def read(self) -> tuple[int, str]:
        return int(torch.cuda.max_memory_allocated(self.device)), "CUDA's allocator"


def _gauge(model: nn.Module) -> _Counter | _Allocator:
    device = device_of(model)
    return _Allocator(device) if device.type == "cuda" else _Counter(model)
