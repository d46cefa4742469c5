"""Where the batches of a step come from: made in place, or ahead of time by worker processes.

Which rows a step holds is `Order`'s word; a row that draws random numbers gets them from its
own place (see `rng`). So the number of workers changes nothing but the time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from sidepath.config import TrainConfig
from sidepath.data.dataset import Data
from sidepath.errors import DataError
from sidepath.training.batching import Batch, Bin, collate, collate_packed, in_passes
from sidepath.training.order import Order

AHEAD = 2
"""Steps that each worker process makes ahead."""
SECONDS_BETWEEN_LOOKS = 1.0
"""How soon a worker notices that its run was killed."""


def order_of(data: Data, config: TrainConfig) -> Order:
    """The order in which a run with these settings sees these data."""
    return Order(
        data.lengths,
        [(part.start, part.stop, part.weight) for part in data.parts],
        size=config.batch_size * config.accumulate,
        seed=config.seed,
        capacity=data.max_tokens if config.packing else None,
    )


def largest_batch(data: Data, config: TrainConfig) -> Batch:
    """The forward pass of the first epoch that memory is for: of its step with the longest row,
    the one with the most tokens, padding counted.
    """
    order = order_of(data, config)
    step = order.largest(0, order.start_of(1))
    batches = Feed(data, order, config.batch_size, config.seed)[step]
    return max(batches, key=lambda batch: batch.ids_BT.numel())


@dataclass(frozen=True, eq=False)
class Feed(Dataset[list[Batch]]):
    """The forward passes of each step for one of `count` processes.

    The bins of a step are dealt out one by one, so that each process gets as many, of like
    lengths; a process that gets none makes an idle pass, since all must take part in a step.
    """

    data: Data
    order: Order
    batch_size: int
    seed: int
    rank: int = 0
    count: int = 1

    def __getitem__(self, step: int) -> list[Batch]:
        """The batches that this process runs in a step (from 0)."""
        epoch, bins = self.order.at(step)
        mine = bins[self.rank :: self.count]
        if not mine:
            idle = self._batch(bins[:1], epoch)
            return [dataclasses.replace(idle, rows=(), tokens=0, weight=0)]
        return [self._batch(chosen, epoch) for chosen in in_passes(mine, self.batch_size)]

    def _batch(self, bins: list[Bin], epoch: int) -> Batch:
        rows = [row for bin_ in bins for row in bin_]
        examples = [self.data.example(row, seed=self.seed, epoch=epoch) for row in rows]
        if self.order.capacity is None:
            return collate(examples, rows, self.data.pad_id)
        of_row = dict(zip(rows, examples, strict=True))
        packed = [[of_row[row] for row in bin_] for bin_ in bins]
        return collate_packed(packed, rows, self.data.pad_id)

    def steps(self, first: int, last: int, workers: int) -> Generator[list[Batch]]:
        """The batches of the steps [first, last), one step after the other.

        Errors: `DataError` for a row that cannot be used, from a worker as from here.
        """
        if workers == 0:
            yield from (self[step] for step in range(first, last))
            return
        loader = DataLoader(
            _Guarded(self),
            batch_size=None,
            sampler=range(first, last),
            num_workers=workers,
            prefetch_factor=AHEAD,
            worker_init_fn=functools.partial(_heed_the_run, run=os.getpid()),
            generator=torch.Generator(),  # else the loader draws from the caller's
        )
        with _sigterm_held():
            ahead = iter(loader)
        for found in ahead:
            if isinstance(found, DataError):
                raise found
            yield found


@dataclass(frozen=True, eq=False)
class _Guarded(Dataset[list[Batch] | DataError]):
    """A feed whose errors are results: torch would bury a worker's error in a traceback."""

    feed: Feed

    def __getitem__(self, step: int) -> list[Batch] | DataError:
        try:
            return self.feed[step]
        except DataError as error:
            return error


@contextlib.contextmanager
def _sigterm_held() -> Iterator[None]:
    """Within the block SIGTERM waits, and processes that are forked begin with it held."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _heed_the_run(_: int, *, run: int) -> None:
    """In a worker: be ended by the run's SIGTERM only, and by the run's own end.

    torchrun, Slurm and others send SIGTERM to every process there is. A run that was asked to
    stop still needs its workers for the step under way, and ends them itself. (torch's own
    watchdog misses a run that was killed before the worker first looked for it.)
    """
    if sys.platform == "linux":
        threading.Thread(target=_until_the_end_of, args=(run,), daemon=True).start()
    else:  # who sent it cannot be told
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _until_the_end_of(run: int) -> None:
    if sys.platform == "linux":
        while os.getppid() == run:
            got = signal.sigtimedwait({signal.SIGTERM}, SECONDS_BETWEEN_LOOKS)
            if got is not None and got.si_pid == run:
                break
        os._exit(0)
