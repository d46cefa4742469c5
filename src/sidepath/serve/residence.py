"""Which adapters are on the model, in simulated time: one of several policies decides who leaves.

Nothing is read: an adapter that is asked for comes after the seconds that its bytes take (floor 5).
"""

from __future__ import annotations

import heapq
import itertools
from abc import ABC, abstractmethod
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from sidepath.errors import ConfigError
from sidepath.serve.scheduler import Standing

Since = Callable[[str], int | None]
"""When the oldest request that waits for an adapter came, counted over all; None: nobody waits."""


class Policy(ABC):
    """Says who leaves. It is told of those who answer nobody (`idle`), who may leave, and of those
    who are asked again (`busy`), who may not.
    """

    @abstractmethod
    def idle(self, adapter: str) -> None:
        """An adapter on the model answers nobody from now on."""

    @abstractmethod
    def busy(self, adapter: str) -> None:
        """An idle adapter was asked for, or has left."""

    @abstractmethod
    def leaves(self) -> str | None:
        """Who leaves for another: one of the idle; None where there is none."""


class Lru(Policy):
    """The one that was used longest ago leaves."""

    def __init__(self) -> None:
        self._order: OrderedDict[str, None] = OrderedDict()

    def idle(self, adapter: str) -> None:
        self._order[adapter] = None

    def busy(self, adapter: str) -> None:
        self._order.pop(adapter, None)

    def leaves(self) -> str | None:
        return next(iter(self._order), None)


class Fifo(Policy):
    """The one that came longest ago leaves, whatever it was used since."""

    def __init__(self) -> None:
        self._came: dict[str, int] = {}
        self._count = itertools.count()
        self._heap: list[tuple[int, str]] = []
        self._idle: set[str] = set()

    def idle(self, adapter: str) -> None:
        if adapter not in self._came:
            self._came[adapter] = next(self._count)
        self._idle.add(adapter)
        heapq.heappush(self._heap, (self._came[adapter], adapter))

    def busy(self, adapter: str) -> None:
        self._idle.discard(adapter)

    def leaves(self) -> str | None:
        while self._heap and self._heap[0][1] not in self._idle:
            heapq.heappop(self._heap)
        if not self._heap:
            return None
        _, adapter = self._heap[0]
        del self._came[adapter]
        return adapter


class Lfu(Policy):
    """The one that was used least often leaves, what is past counting less and less: its uses and
    the count at which the last one left (LFU with dynamic ageing; Arlitt et al., 2000).
    """

    def __init__(self) -> None:
        self._uses: dict[str, int] = {}
        self._age = 0
        self._rank: dict[str, int] = {}
        self._heap: list[tuple[int, int, str]] = []
        self._count = itertools.count()

    def idle(self, adapter: str) -> None:
        self._uses[adapter] = self._uses.get(adapter, 0) + 1
        self._rank[adapter] = self._age + self._uses[adapter]
        heapq.heappush(self._heap, (self._rank[adapter], next(self._count), adapter))

    def busy(self, adapter: str) -> None:
        self._rank.pop(adapter, None)

    def leaves(self) -> str | None:
        while self._heap and self._rank.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        if not self._heap:
            return None
        self._age, _, adapter = self._heap[0]
        del self._uses[adapter]
        return adapter


class Chance(Policy):
    """Any of the idle leaves."""

    def __init__(self) -> None:
        self._random = Random(0)
        self._idle: list[str] = []
        self._at: dict[str, int] = {}

    def idle(self, adapter: str) -> None:
        self._at[adapter] = len(self._idle)
        self._idle.append(adapter)

    def busy(self, adapter: str) -> None:
        at = self._at.pop(adapter, None)
        if at is None:
            return
        last = self._idle.pop()
        if last != adapter:
            self._idle[at] = last
            self._at[last] = at

    def leaves(self) -> str | None:
        return self._random.choice(self._idle) if self._idle else None


POLICIES: Mapping[str, Callable[[], Policy]] = {
    "lru": Lru,
    "lfu": Lfu,
    "fifo": Fifo,
    "random": Chance,
}


@dataclass(frozen=True)
class Shelf:
    """Where adapters of one size come from, and how many are on the model. Errors: `ConfigError`
    that names every impossible value.
    """

    resident: int
    """Adapters on the model at once."""
    seconds: float
    """From the first byte of one until it answers: its bytes over the bandwidth, and what checking
    and placing it takes."""
    together: int = 4
    """Adapters on their way at once; each takes its own `seconds`."""
    policy: str = "lru"
    """Who leaves, by its name in `POLICIES`."""

    def __post_init__(self) -> None:
        rules = {
            "resident": self.resident >= 1,
            "seconds": self.seconds >= 0,
            "together": self.together >= 1,
            "policy": self.policy in POLICIES,
        }
        faults = [f"{name} is {vars(self)[name]}" for name, holds in rules.items() if not holds]
        if faults:
            raise ConfigError(
                "no adapter can be kept like this",
                faults=faults,
                expected=f"policy: one of {', '.join(POLICIES)}; at least 1 resident, 1 together",
            )


@dataclass
class _Use:
    """The requests of one adapter."""

    waiting: int = 0
    running: int = 0


class Residence:
    """Who is on the model at which time. As in the engine nobody leaves whose requests run, and of
    those whose requests wait only one whose oldest is younger than that of whoever comes.
    """

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self._policy = POLICIES[shelf.policy]()
        self._here: set[str] = set()
        self._coming: dict[str, float] = {}
        self._uses: defaultdict[str, _Use] = defaultdict(_Use)
        self.loads = self.hits = 0
        """Adapters that came; requests whose adapter was there already when they came."""

    def standing(self, adapter: str) -> Standing:
        """As the scheduler asks for it."""
        if adapter in self._here:
            return "here"
        return "coming" if adapter in self._coming else "away"

    def bring(self, adapter: str, now: float, since: Since) -> bool:
        """Begin to bring one, if somebody may leave for it; returns whether."""
        if len(self._coming) >= self.shelf.together:
            return False
        if len(self._here) + len(self._coming) >= self.shelf.resident:
            leaving = self._policy.leaves() or self._younger(adapter, since)
            if leaving is None:
                return False
            self._policy.busy(leaving)
            self._here.remove(leaving)
        self._coming[adapter] = now + self.shelf.seconds
        return True

    def _younger(self, adapter: str, since: Since) -> str | None:
        """Of those whose requests only wait: the one whose oldest is the youngest, if it is younger
        than this adapter's.
        """
        asked = since(adapter)
        waiting = (one for one in self._here if not self._uses[one].running)
        heads = [(head, one) for one in waiting if (head := since(one)) is not None]
        head, youngest = max(heads, default=(-1, None))
        return youngest if asked is not None and head > asked else None

    def come(self, now: float) -> None:
        """Those whose seconds are over are on the model."""
        for adapter in [name for name, at in self._coming.items() if at <= now]:
            del self._coming[adapter]
            self._here.add(adapter)
            self.loads += 1
            self._settle(adapter)

    def next(self) -> float | None:
        """When the next one comes."""
        return min(self._coming.values(), default=None)

    def asked(self, adapter: str) -> None:
        """A request of it waits from now on."""
        self.hits += adapter in self._here
        self._uses[adapter].waiting += 1
        self._policy.busy(adapter)

    def begun(self, adapter: str) -> None:
        """A request of it runs that waited."""
        self._uses[adapter].waiting -= 1
        self._uses[adapter].running += 1

    def ended(self, adapter: str) -> None:
        """A request of it does not run any more."""
        self._uses[adapter].running -= 1
        self._settle(adapter)

    def _settle(self, adapter: str) -> None:
        if self._uses[adapter] == _Use():
            self._policy.idle(adapter)
