"""Requests that wait: in order of arrival, and by adapter (floor 5)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(eq=False)
class Entry:
    """A request as the scheduler sees it."""

    request: int
    arrival: int
    adapter: str | None
    known: int
    """Tokens of the prompt and of the answer so far."""
    total: int
    """The same at the longest."""
    cached: int = 0
    """Tokens that were computed already."""


class Waiting:
    """The queue. `held(adapter)` says whose requests keep their place and hold up nobody."""

    def __init__(self, held: Callable[[str | None], bool]) -> None:
        self._held = held
        self._arrivals = 0
        self._entries: dict[int, Entry] = {}
        self._queues: dict[str | None, deque[Entry]] = {}
        self._ahead: set[int] = set()
        """Arrival numbers of those who entered before the oldest that waits, and came later."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request: int) -> bool:
        return request in self._entries

    @property
    def overtaken(self) -> int:
        """How many entered before the oldest that waits, and came later."""
        return len(self._ahead)

    @property
    def adapters(self) -> Iterable[str | None]:
        """The adapters that are waited for."""
        return self._queues.keys()

    def add(self, request: int, adapter: str | None, prompt: int, answer: int) -> None:
        """Let one wait behind all others."""
        entry = Entry(request, self._arrivals, adapter, prompt, prompt + answer)
        self._arrivals += 1
        self._entries[request] = entry
        self._queues.setdefault(adapter, deque()).append(entry)

    def oldest(self) -> Entry | None:
        """The oldest that is not held."""
        entries = self._entries.values()
        return next((entry for entry in entries if not self._held(entry.adapter)), None)

    def head(self, adapter: str | None) -> Entry | None:
        """The oldest of an adapter."""
        queue = self._queues.get(adapter)
        return queue[0] if queue else None

    def take(self, entry: Entry, *, entered: bool) -> None:
        """Take one out of the queue: it enters, or it was cancelled."""
        del self._entries[entry.request]
        queue = self._queues[entry.adapter]
        queue.remove(entry)  # an entering one is the first
        if not queue:
            del self._queues[entry.adapter]
        if entered:
            self._ahead.add(entry.arrival)
        oldest = self.oldest()
        passed = self._arrivals if oldest is None else oldest.arrival
        self._ahead = {arrival for arrival in self._ahead if arrival > passed}

    def get(self, request: int) -> Entry | None:
        """The entry of a request that waits."""
        return self._entries.get(request)
