"""How often something may happen (floor 5)."""

from __future__ import annotations

import time
from collections.abc import Callable


class Bucket:
    """A token bucket: `per_minute` at once after a quiet minute, and that many a minute in all.

    For one thread.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._left, self._seen = per_minute, clock()

    def take(self) -> float:
        """Take one: returns 0; or, where none is left, in how many seconds one will be."""
        now = self._clock()
        grown = self._left + (now - self._seen) * self.per_minute / 60
        self._left, self._seen = min(self.per_minute, grown), now
        if self._left < 1:
            return (1 - self._left) * 60 / self.per_minute
        self._left -= 1
        return 0.0
