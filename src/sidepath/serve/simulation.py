"""The scheduler in simulated time: what a load would meet, without a model (floor 5).

The very `Scheduler` that the engine runs decides; only the clock is made up. A step takes

    seconds = step + row x rows + token x tokens + adapter x adapters that take part

whose four coefficients are measured on the machine in question. Adapters are all on the model, or
come and go (`residence.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sidepath.errors import Overloaded
from sidepath.serve.residence import Residence, Shelf
from sidepath.serve.scheduler import Batch, Limits, Scheduler, always_here


@dataclass(frozen=True)
class Costs:
    """Seconds of a step and of what takes part in it."""

    step: float
    """Of any step: reading the base's weights, Python, the launch of operators."""
    row: float = 0.0
    """Of each row: its attention and its sampling."""
    token: float = 0.0
    """Of each token: its products."""
    adapter: float = 0.0
    """Of each different adapter: reading its factors."""

    def seconds(self, batch: Batch) -> float:
        adapters = {row.adapter for row in batch.rows} - {None}
        return (
            self.step
            + self.row * len(batch.rows)
            + self.token * batch.tokens
            + self.adapter * len(adapters)
        )


@dataclass(frozen=True)
class Arrival:
    """A request that comes at `at` seconds, and ends after `answer` tokens."""

    at: float
    adapter: str | None
    prompt: int
    answer: int


@dataclass(frozen=True)
class Simulated:
    """What the requests met. Times are seconds from arrival, in order of arrival; infinite for
    one that was turned away.
    """

    first_token: tuple[float, ...]
    last_token: tuple[float, ...]
    seconds: float
    """From the first arrival until the last token."""
    steps: int
    tokens: int
    """Tokens that were computed, those of prompts too."""
    adapters: int
    """Adapters that took part, summed over the steps."""
    turned_away: int
    loads: int = 0
    """Adapters that came to the model."""
    hits: int = 0
    """Requests whose adapter was on the model when they came."""

    @property
    def requests_per_second(self) -> float:
        served = len(self.last_token) - self.turned_away
        return served / self.seconds if self.seconds else 0.0


def simulate(
    limits: Limits, costs: Costs, arrivals: Iterable[Arrival], shelf: Shelf | None = None
) -> Simulated:
    """Serve `arrivals` in simulated time. Without `shelf` every adapter is always on the model.

    Errors: `RequestRefused` for one that never fits the limits.
    """
    coming = sorted(arrivals, key=lambda arrival: arrival.at)
    run = _Run(limits, costs, coming, None if shelf is None else Residence(shelf))
    while run.step():
        pass
    start = coming[0].at if coming else 0.0
    return Simulated(
        tuple(run.first),
        tuple(run.last),
        run.now - start,
        run.steps,
        run.tokens,
        run.adapters,
        run.turned_away,
        0 if run.residence is None else run.residence.loads,
        0 if run.residence is None else run.residence.hits,
    )


class _Run:
    def __init__(
        self,
        limits: Limits,
        costs: Costs,
        coming: Sequence[Arrival],
        residence: Residence | None,
    ) -> None:
        self.residence = residence
        standing = always_here if residence is None else residence.standing
        self.scheduler, self.costs, self.coming = Scheduler(limits, standing), costs, coming
        self.now, self.next = 0.0, 0
        self.first = [math.inf] * len(coming)
        self.last = [math.inf] * len(coming)
        self.answered = [0] * len(coming)
        self.steps = self.tokens = self.adapters = self.turned_away = 0

    def step(self) -> bool:
        """One step, or the wait for what comes next; False when all is over."""
        self._arrive()
        self._bring()
        for request in self.scheduler.admit():
            adapter = self.coming[request].adapter
            if self.residence is not None and adapter is not None:
                self.residence.begun(adapter)
        batch = self.scheduler.batch()
        if batch is None:
            return self._wait()
        self.now += self.costs.seconds(batch)
        self.steps += 1
        self.tokens += batch.tokens
        self.adapters += len({row.adapter for row in batch.rows} - {None})
        ended = self._sampled(batch)
        self.scheduler.done(batch, ended)
        for request in ended:
            adapter = self.coming[request].adapter
            if self.residence is not None and adapter is not None:
                self.residence.ended(adapter)
        return True

    def _wait(self) -> bool:
        """Let time go on to what comes next, a request or an adapter; False if nothing does."""
        times = [] if self.next == len(self.coming) else [self.coming[self.next].at]
        lands = None if self.residence is None else self.residence.next()
        times += [] if lands is None else [lands]
        if not times:
            return False
        self.now = max(self.now, min(times))
        return True

    def _bring(self) -> None:
        """Let adapters come that are there by now, and begin to bring those that are asked for."""
        if self.residence is None:
            return
        self.residence.come(self.now)
        for adapter in self.scheduler.wanted():
            if not self.residence.bring(adapter, self.now, self.scheduler.since):
                return

    def _arrive(self) -> None:
        while self.next < len(self.coming) and self.coming[self.next].at <= self.now:
            arrival = self.coming[self.next]
            try:
                self.scheduler.submit(self.next, arrival.adapter, arrival.prompt, arrival.answer)
                if self.residence is not None and arrival.adapter is not None:
                    self.residence.asked(arrival.adapter)
            except Overloaded:
                self.turned_away += 1
            self.next += 1

    def _sampled(self, batch: Batch) -> set[int]:
        """Book the new tokens; returns the requests that end with them."""
        ended = set()
        for row in batch.rows:
            if not row.samples:
                continue
            since = self.now - self.coming[row.request].at
            if not self.answered[row.request]:
                self.first[row.request] = since
            self.answered[row.request] += 1
            if self.answered[row.request] == self.coming[row.request].answer:
                self.last[row.request] = since
                ended.add(row.request)
        return ended
