"""Whether others used the machine while it was measured: then neither times nor ratios hold.

An operator that computes in several threads waits for the slowest of them. With another process
on one of two cores each such operator may wait a scheduler's slice (8 ms seen) however small it
is, so that what is measured is the number of operators: ratios of 3 and of 80 came of that.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STAT = Path("/proc/stat")
TOLERATED = 0.05
"""Share of the machine that others may use."""
_BUSY = (0, 1, 2, 5, 6, 7)
"""Columns of /proc/stat: user, nice, system, irq, softirq, steal; not idle, nor waiting."""


@dataclass
class Crowd:
    """What others used of the machine during a block; None where the system does not say."""

    share: float | None = None
    """Processor seconds of others over all there were."""

    @property
    def note(self) -> str | None:
        """What a reader has to know; None where all was quiet."""
        if self.share is None or self.share <= TOLERATED:
            return None
        return (
            f"NOT QUIET: others used {self.share:.0%} of the processors meanwhile; neither times "
            "nor ratios can be trusted: measure again alone"
        )


@contextmanager
def watched_crowd(stat: Path = STAT) -> Iterator[Crowd]:
    """Within the block, what other processes use; the `Crowd` is filled when it ends."""
    crowd = Crowd()
    busy, own, wall = busy_seconds(stat), time.process_time(), time.monotonic()
    yield crowd
    after = busy_seconds(stat)
    if busy is not None and after is not None:
        there = (time.monotonic() - wall) * (os.cpu_count() or 1)
        others = after - busy - (time.process_time() - own)
        crowd.share = min(1.0, max(0.0, others / max(there, 1e-9)))


def busy_seconds(stat: Path = STAT) -> float | None:
    """Processor seconds used since the machine started, by all processes together."""
    try:
        columns = stat.read_text().split("\n", 1)[0].split()[1:]
        return sum(int(columns[at]) for at in _BUSY) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
