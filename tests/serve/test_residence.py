"""Who leaves: each policy against a slow reference, and adapters that come and go by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidepath.errors import ConfigError
from sidepath.serve.residence import POLICIES, Shelf
from sidepath.serve.scheduler import Limits
from sidepath.serve.simulation import Arrival, Costs, simulate

ONE = Limits(rows=1, slots=1, step_tokens=16)


class Slow:
    """All that was ever used, looked through each time: (policy, since when, uses, idle)."""

    def __init__(self, name: str) -> None:
        self.name, self.clock, self.age = name, 0, 0
        self.came: dict[str, int] = {}
        self.used: dict[str, int] = {}
        self.uses: dict[str, int] = {}
        self.rank: dict[str, int] = {}
        self.free: set[str] = set()

    def idle(self, one: str) -> None:
        self.clock += 1
        self.came.setdefault(one, self.clock)
        self.used[one] = self.clock
        self.uses[one] = self.uses.get(one, 0) + 1
        self.rank[one] = self.age + self.uses[one]
        self.free.add(one)

    def busy(self, one: str) -> None:
        self.free.discard(one)

    def leaves(self) -> str | None:
        keys: dict[str, Any] = {
            "lru": self.used.__getitem__,
            "fifo": self.came.__getitem__,
            "lfu": lambda one: (self.rank[one], self.used[one]),
        }
        found = min(self.free, key=keys[self.name], default=None)
        if found is not None:
            self.age = self.rank[found]
            del self.came[found], self.uses[found]
        return found


@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("name", ["lru", "fifo", "lfu"])
@given(st.lists(st.sampled_from("abcdefgh"), max_size=60))
def test_a_policy_lets_leave_whom_a_look_at_all_would(name: str, given: list[str]) -> None:
    fast, slow, here = POLICIES[name](), Slow(name), set[str]()
    for one in given:
        if one in here:
            fast.busy(one)
            slow.busy(one)
        elif len(here) == 3:
            leaving = fast.leaves()
            assert leaving == slow.leaves()
            assert leaving is not None
            fast.busy(leaving)
            slow.busy(leaving)
            here.remove(leaving)
        here.add(one)
        fast.idle(one)
        slow.idle(one)


def test_chance_lets_only_the_idle_leave() -> None:
    policy = POLICIES["random"]()
    for one in "abcd":
        policy.idle(one)
    policy.busy("b")
    policy.busy("b")
    found = set()
    while (leaving := policy.leaves()) is not None:
        policy.busy(leaving)
        found.add(leaving)
    assert found == set("acd")


def test_a_cold_adapter_by_hand() -> None:
    """It comes after 5 seconds, answers in one of 1; then the other comes in its place."""
    arrivals = [Arrival(0.0, "a", 1, 1), Arrival(10.0, "a", 1, 1), Arrival(20.0, "b", 1, 1)]
    found = simulate(ONE, Costs(step=1.0), arrivals, Shelf(resident=1, seconds=5.0))
    assert found.first_token == (6.0, 1.0, 6.0)
    assert (found.loads, found.hits) == (2, 1)


def test_whoever_answers_stays_and_others_go_on_meanwhile() -> None:
    arrivals = [Arrival(0.0, "a", 1, 10), Arrival(1.0, "b", 1, 1), Arrival(1.0, None, 1, 1)]
    limits = Limits(rows=4, slots=4, step_tokens=16)
    found = simulate(limits, Costs(step=1.0), arrivals, Shelf(resident=1, seconds=2.0))
    assert found.last_token[0] == 12.0, "two seconds to come, ten steps"
    assert found.last_token[2] <= 3.0, "the base waits for nobody"
    assert found.first_token[1] == 12.0 - 1.0 + 2.0 + 1.0


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(0, 20),
            st.sampled_from([None, *"abcdef"]),
            st.integers(1, 12),
            st.integers(1, 5),
        ),
        max_size=40,
    ),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 3),
    st.sampled_from(sorted(POLICIES)),
)
def test_everybody_is_answered_in_the_end(
    given: list[tuple[float, str | None, int, int]],
    resident: int,
    together: int,
    patience: int,
    policy: str,
) -> None:
    arrivals = [Arrival(*each) for each in given]
    limits = Limits(rows=3, slots=2, step_tokens=10, patience=patience)
    shelf = Shelf(resident, seconds=1.5, together=together, policy=policy)
    found = simulate(limits, Costs(step=1.0), arrivals, shelf)
    assert all(last < math.inf for last in found.last_token)
    assert found.tokens == sum(each.prompt + each.answer - 1 for each in arrivals)
    adapters = {each.adapter for each in arrivals} - {None}
    assert found.loads >= len(adapters)
    if resident >= len(adapters):
        assert found.loads == len(adapters)


def test_an_impossible_shelf_names_all_that_is_wrong() -> None:
    with pytest.raises(ConfigError) as error:
        Shelf(resident=0, seconds=-1.0, together=0, policy="newest")
    assert len(error.value.faults) == 4
