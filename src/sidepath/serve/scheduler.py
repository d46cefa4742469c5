"""Which requests take part in the next step, and with how many tokens each (floor 5).

The scheduler knows lengths and names and never touches a tensor, so that the engine, the property
tests and the simulation (`simulation.py`) run the very same decisions. Requests wait, run and end:

- **Admission** is in order of arrival. A request may overtake an older one only where that waits
  for a *slot*: where as many adapters run as a batch may name, requests of these and of the base go
  on. No request is overtaken more than `patience` times; from then on nobody enters before it.
- **Memory** is reserved when a request enters: a place for every token it may come to have. So a
  running request always ends, and none is ever preempted, moved out or computed twice. What could
  never fit is refused at `submit`.
- **A step** takes one token of every row that is past its prompt, and fills what is left of
  `step_tokens` with pieces of prompts, in order of entry (chunked prefill, as in Sarathi; Agrawal
  et al., 2023): a long prompt delays the others' next token by one step's length at most.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from sidepath.errors import ConfigError, Overloaded, RequestRefused

BASE_SLOT = 0
"""The slot of rows that no adapter answers."""


@dataclass(frozen=True)
class Limits:
    """What may run at once. Errors: `ConfigError` that names every impossible one."""

    rows: int = 16
    """Requests that run at once."""
    slots: int = 8
    """Different adapters that run at once, beside the base."""
    context: int = 2048
    """Tokens of a request, prompt and answer together."""
    cached_tokens: int = 16 * 2048
    """Tokens of all running requests together, each counted with the longest answer it asks for."""
    step_tokens: int = 256
    """Tokens of one step, over all rows."""
    queue: int = 1024
    """Requests that may wait."""
    patience: int = 64
    """How many later requests may enter before one that waits for a slot."""

    def __post_init__(self) -> None:
        faults = [
            f"{name} is {value}, and must be at least 1"
            for name, value in vars(self).items()
            if value < (0 if name == "patience" else 1)
        ]
        if self.step_tokens <= self.rows:
            faults.append(
                f"step_tokens is {self.step_tokens}, and must be more than rows ({self.rows}): "
                "every row may take one, and prompts need the rest"
            )
        if faults:
            raise ConfigError("these limits let nothing be served", faults=faults)


@dataclass(frozen=True)
class Row:
    """One request's part in a step: its tokens at positions `start ... start + count - 1`."""

    request: int
    adapter: str | None
    slot: int
    start: int
    count: int
    samples: bool
    """Whether these are the last tokens known, so that a new one follows from them."""


@dataclass(frozen=True)
class Batch:
    """The rows of one step, sorted by slot, rows of the base first."""

    rows: tuple[Row, ...]

    @property
    def tokens(self) -> int:
        return sum(row.count for row in self.rows)


@dataclass(eq=False)
class _Entry:
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


class Scheduler:
    """Requests by number: `submit`, then `next` and `done` in turn, and `cancel` at any time
    between them. Not safe for several threads at once.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.reserved = 0
        """Tokens reserved by the running requests, of `limits.cached_tokens`."""
        self._arrivals = 0
        self._waiting: dict[int, _Entry] = {}
        self._queues: dict[str | None, deque[_Entry]] = {}
        self._running: dict[int, _Entry] = {}
        self._slots: dict[str, int] = {}
        self._rows_of: dict[str, int] = {}
        self._ahead: set[int] = set()
        """Arrival numbers of those who entered before the oldest that waits, and came later."""

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    @property
    def running(self) -> tuple[int, ...]:
        """The requests that run, in order of entry."""
        return tuple(self._running)

    @property
    def slots(self) -> dict[str, int]:
        """The slot of each adapter that runs: 1 ... `limits.slots`."""
        return dict(self._slots)

    def submit(self, request: int, adapter: str | None, prompt: int, answer: int) -> None:
        """Let a request wait: `prompt` tokens, and up to `answer` more.

        Errors: `RequestRefused` for one that can never run; `Overloaded` when the queue is full.
        """
        if request in self._waiting or request in self._running:
            raise ValueError(f"request {request} is here already")
        self.check(prompt, answer)
        if len(self._waiting) >= self.limits.queue:
            raise Overloaded(
                "the queue is full",
                found=f"{len(self._waiting)} requests wait",
                hint="try again later",
            )
        entry = _Entry(request, self._arrivals, adapter, prompt, prompt + answer)
        self._arrivals += 1
        self._waiting[request] = entry
        self._queues.setdefault(adapter, deque()).append(entry)

    def check(self, prompt: int, answer: int) -> None:
        """Errors: `RequestRefused` for lengths that can never run, with every reason."""
        faults = []
        if prompt < 1:
            faults.append("the prompt is empty: at least one token is needed to go on from")
        if answer < 1:
            faults.append(f"{answer} new tokens are asked for: at least 1 is possible")
        room = min(self.limits.context, self.limits.cached_tokens)
        if prompt + answer > room:
            faults.append(
                f"{prompt} tokens of prompt and {answer} of answer are {prompt + answer}: "
                f"at most {room} have room"
            )
        if faults:
            raise RequestRefused("the request cannot be served", faults=faults)

    def cancel(self, request: int) -> bool:
        """Forget a request, waiting or running; its row and memory are free at once.

        Returns whether it was there.
        """
        entry = self._waiting.get(request)
        if entry is not None:
            self._leave_queue(entry)
            return True
        entry = self._running.get(request)
        if entry is not None:
            self._leave(entry)
        return entry is not None

    def next(self) -> Batch | None:
        """The rows of the next step; None when there is nothing to do."""
        self._admit()
        left = self.limits.step_tokens
        counts: dict[int, int] = {}
        past_prompt = [e for e in self._running.values() if e.known - e.cached == 1]
        prompts = [e for e in self._running.values() if e.known - e.cached > 1]
        for entry in (*past_prompt, *prompts):
            counts[entry.request] = min(entry.known - entry.cached, left)
            left -= counts[entry.request]
        rows = [self._row(e, counts[e.request]) for e in self._running.values()]
        rows = sorted((row for row in rows if row.count), key=lambda row: row.slot)
        return Batch(tuple(rows)) if rows else None

    def done(self, batch: Batch, ended: Collection[int] = ()) -> None:
        """Say that a step was computed: rows that sample have one token more, `ended` leave.

        Rows of requests that were cancelled meanwhile are passed over.
        """
        for row in batch.rows:
            entry = self._running.get(row.request)
            if entry is None:
                continue
            if entry.cached != row.start:
                raise ValueError(f"request {row.request} is at {entry.cached}, not {row.start}")
            entry.cached += row.count
            entry.known += row.samples
            if row.request in ended:
                self._leave(entry)
            elif entry.known >= entry.total:
                raise ValueError(f"request {row.request} has all its tokens and did not end")

    def _row(self, entry: _Entry, count: int) -> Row:
        slot = BASE_SLOT if entry.adapter is None else self._slots[entry.adapter]
        last = entry.cached + count == entry.known
        return Row(entry.request, entry.adapter, slot, entry.cached, count, last)

    def _admit(self) -> None:
        while len(self._running) < self.limits.rows:
            entry = self._candidate()
            if entry is None or self.reserved + entry.total > self.limits.cached_tokens:
                return
            self._leave_queue(entry, entered=True)
            self._running[entry.request] = entry
            self.reserved += entry.total
            if entry.adapter is not None:
                self._take_slot(entry.adapter)

    def _candidate(self) -> _Entry | None:
        """The oldest request that has a slot: the oldest of all, unless it may be overtaken."""
        oldest = self._oldest()
        if oldest is None or self._has_slot(oldest.adapter):
            return oldest
        if len(self._ahead) >= self.limits.patience:
            return None
        heads = [self._queues[name][0] for name in (None, *self._slots) if name in self._queues]
        return min(heads, key=lambda entry: entry.arrival, default=None)

    def _oldest(self) -> _Entry | None:
        return next(iter(self._waiting.values()), None)

    def _has_slot(self, adapter: str | None) -> bool:
        return adapter is None or adapter in self._slots or len(self._slots) < self.limits.slots

    def _take_slot(self, adapter: str) -> None:
        if adapter not in self._slots:
            used = set(self._slots.values())
            free = (slot for slot in range(1, self.limits.slots + 1) if slot not in used)
            self._slots[adapter] = next(free)
        self._rows_of[adapter] = self._rows_of.get(adapter, 0) + 1

    def _leave_queue(self, entry: _Entry, entered: bool = False) -> None:
        del self._waiting[entry.request]
        queue = self._queues[entry.adapter]
        queue.remove(entry)  # an entering one is the first
        if not queue:
            del self._queues[entry.adapter]
        if entered:
            self._ahead.add(entry.arrival)
        oldest = self._oldest()
        passed = self._arrivals if oldest is None else oldest.arrival
        self._ahead = {arrival for arrival in self._ahead if arrival > passed}

    def _leave(self, entry: _Entry) -> None:
        del self._running[entry.request]
        self.reserved -= entry.total
        if entry.adapter is not None:
            self._rows_of[entry.adapter] -= 1
            if not self._rows_of[entry.adapter]:
                del self._rows_of[entry.adapter], self._slots[entry.adapter]
