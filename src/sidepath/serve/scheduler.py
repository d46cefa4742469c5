"""Which requests take part in the next step, and with how many tokens each (floor 5).

The scheduler knows lengths and names and never touches a tensor, so that the engine, the property
tests and the simulation (`simulation.py`) run the very same decisions. Requests wait, run and end:

- **Admission** is in order of arrival. A request may overtake an older one only where that waits
  for a *slot*: where as many adapters run as a batch may name, requests of these and of the base go
  on. No request is overtaken more than `patience` times; from then on nobody enters before it.
- **Adapters** that are not on the model yet: one that is being read ("coming") holds up nobody, and
  its requests keep their place; for one that no room was found for ("away") requests wait as they
  do for a slot, so that in the end enough has ended for it to come.
- **Memory** is reserved when a request enters: a place for every token it may come to have. So a
  running request always ends, and none is ever preempted, moved out or computed twice. What could
  never fit is refused at `submit`.
- **A step** takes one token of every row that is past its prompt, and fills what is left of
  `step_tokens` with pieces of prompts, in order of entry (chunked prefill, as in Sarathi; Agrawal
  et al., 2023): a long prompt delays the others' next token by one step's length at most.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

from sidepath.errors import ConfigError, Overloaded, RequestRefused
from sidepath.serve.waiting import Entry, Waiting

BASE_SLOT = 0
"""The slot of rows that no adapter answers."""

Standing = Literal["here", "leaving", "away", "coming"]
"""Whether an adapter is on the model, about to leave it, has no room there, or is on its way."""


def always_here(adapter: str) -> Standing:
    """Where every adapter is on the model."""
    return "here"


_MAY_BE_NONE = ("patience", "prefixes")


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
    prefixes: int = 16
    """Rows of ended requests that are kept, each with its tokens at most a context long, so that
    requests that begin alike need not compute it again; beside `cached_tokens`."""

    def __post_init__(self) -> None:
        faults = [
            f"{name} is {value}, and must be at least {0 if name in _MAY_BE_NONE else 1}"
            for name, value in vars(self).items()
            if value < (0 if name in _MAY_BE_NONE else 1)
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


class Scheduler:
    """Requests by number: `submit`, then `next` and `done` in turn, and `cancel` at any time
    between them. Not safe for several threads at once.

    `standing` is asked anew at each decision; one that runs must be "here".
    """

    def __init__(self, limits: Limits, standing: Callable[[str], Standing] = always_here) -> None:
        self.limits, self._standing = limits, standing
        self.reserved = 0
        """Tokens reserved by the running requests, of `limits.cached_tokens`."""
        self._waiting = Waiting(self._is_coming)
        self._running: dict[int, Entry] = {}
        self._slots: dict[str, int] = {}
        self._rows_of: dict[str, int] = {}

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
        self._waiting.add(request, adapter, prompt, answer)

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
            self._waiting.take(entry, entered=False)
            return True
        entry = self._running.get(request)
        if entry is not None:
            self._leave(entry)
        return entry is not None

    def wanted(self) -> list[str]:
        """The adapters that are away and asked for, by their oldest request."""
        asked = [name for name in self._waiting.adapters if name is not None]
        away = [name for name in asked if self._standing(name) == "away"]
        return sorted(away, key=lambda name: self.since(name) or 0)

    def runs(self, adapter: str) -> bool:
        """Whether a request of this adapter runs."""
        return adapter in self._slots

    def since(self, adapter: str) -> int | None:
        """When the oldest request that waits for this adapter came, counted over all requests."""
        head = self._waiting.head(adapter)
        return None if head is None else head.arrival

    def next(self) -> Batch | None:
        """Let enter who may, and give the rows of the next step; None if there are none."""
        self.admit()
        return self.batch()

    def batch(self) -> Batch | None:
        """The rows of the next step, of those that entered; None if there are none."""
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

    def _row(self, entry: Entry, count: int) -> Row:
        slot = BASE_SLOT if entry.adapter is None else self._slots[entry.adapter]
        last = entry.cached + count == entry.known
        return Row(entry.request, entry.adapter, slot, entry.cached, count, last)

    def admit(self) -> list[int]:
        """Let enter who may; returns these requests."""
        entered: list[int] = []
        while len(self._running) < self.limits.rows:
            entry = self._candidate()
            if entry is None or self.reserved + entry.total > self.limits.cached_tokens:
                break
            self._waiting.take(entry, entered=True)
            self._running[entry.request] = entry
            entered.append(entry.request)
            self.reserved += entry.total
            if entry.adapter is not None:
                self._take_slot(entry.adapter)
        return entered

    def skip(self, request: int, tokens: int) -> None:
        """Say that a request that has just entered has its first tokens computed already; at
        least one of its prompt is left.
        """
        entry = self._running[request]
        if entry.cached or not 0 <= tokens < entry.known:
            raise ValueError(f"request {request} cannot skip {tokens} of {entry.known} tokens")
        entry.cached = tokens

    def _candidate(self) -> Entry | None:
        """The oldest request that may run: the oldest of all, unless it may be overtaken."""
        oldest = self._waiting.oldest()
        if oldest is None or self._may_run(oldest.adapter):
            return oldest
        if self._waiting.overtaken >= self.limits.patience:
            return None
        full = len(self._slots) >= self.limits.slots
        names = (None, *self._slots) if full else self._waiting.adapters
        heads = [self._waiting.head(name) for name in names if self._may_run(name)]
        there = [head for head in heads if head is not None]
        return min(there, key=lambda entry: entry.arrival, default=None)

    def _is_coming(self, adapter: str | None) -> bool:
        return adapter is not None and self._standing(adapter) == "coming"

    def _may_run(self, adapter: str | None) -> bool:
        if adapter is None or adapter in self._slots:
            return True
        return len(self._slots) < self.limits.slots and self._standing(adapter) == "here"

    def _take_slot(self, adapter: str) -> None:
        if adapter not in self._slots:
            used = set(self._slots.values())
            free = (slot for slot in range(1, self.limits.slots + 1) if slot not in used)
            self._slots[adapter] = next(free)
        self._rows_of[adapter] = self._rows_of.get(adapter, 0) + 1

    def _leave(self, entry: Entry) -> None:
        del self._running[entry.request]
        self.reserved -= entry.total
        if entry.adapter is not None:
            self._rows_of[entry.adapter] -= 1
            if not self._rows_of[entry.adapter]:
                del self._rows_of[entry.adapter], self._slots[entry.adapter]
