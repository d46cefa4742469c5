"""The scheduler against what it promises, over random arrivals, cancels and lengths."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidepath.errors import ConfigError, Overloaded, RequestRefused
from sidepath.serve.scheduler import Batch, Limits, Scheduler, Standing

limits = st.builds(
    Limits,
    rows=st.integers(1, 5),
    slots=st.integers(1, 3),
    context=st.integers(10, 40),
    cached_tokens=st.integers(10, 90),
    step_tokens=st.integers(6, 20),
    queue=st.just(1000),
    patience=st.integers(0, 4),
)
arrivals = st.lists(
    st.tuples(
        st.integers(0, 6),  # steps until it comes
        st.sampled_from([None, *"abcde"]),
        st.integers(1, 25),  # prompt
        st.integers(1, 12),  # longest answer
        st.integers(1, 12),  # where it ends by itself
        st.one_of(st.none(), st.integers(0, 8)),  # cancelled so many steps after it came
    ),
    max_size=25,
)


@dataclass
class World:
    """Drives a scheduler and keeps its own books, from the batches alone."""

    scheduler: Scheduler
    total: dict[int, int] = field(default_factory=dict)
    adapter: dict[int, str | None] = field(default_factory=dict)
    prompt: dict[int, int] = field(default_factory=dict)
    end: dict[int, int] = field(default_factory=dict)
    cached: Counter[int] = field(default_factory=Counter)
    answered: Counter[int] = field(default_factory=Counter)
    entered: list[int] = field(default_factory=list)
    gone: set[int] = field(default_factory=set)
    ended: list[int] = field(default_factory=list)

    def come(self, number: int, adapter: str | None, prompt: int, answer: int, end: int) -> bool:
        room = min(self.scheduler.limits.context, self.scheduler.limits.cached_tokens)
        if prompt + answer > room:
            with pytest.raises(RequestRefused, match="have room"):
                self.scheduler.submit(number, adapter, prompt, answer)
            return False
        self.scheduler.submit(number, adapter, prompt, answer)
        self.total[number], self.adapter[number] = prompt + answer, adapter
        self.prompt[number], self.end[number] = prompt, min(end, answer)
        return True

    def leave(self, number: int) -> None:
        there = number in self.total and number not in self.gone and number not in self.ended
        assert self.scheduler.cancel(number) is there
        if there:
            self.gone.add(number)
            assert number not in self.scheduler.running

    def step(self) -> Batch | None:
        batch = self.scheduler.next()
        running = self.scheduler.running
        self.entered += [number for number in running if number not in self.entered]
        self.check(batch, running)
        if batch is None:
            return None
        ended = set()
        for row in batch.rows:
            number = row.request
            assert row.start == self.cached[number], "every token once, in order"
            self.cached[number] += row.count
            known = self.prompt[number] + self.answered[number]
            assert row.samples == (self.cached[number] == known)
            assert self.cached[number] <= known
            self.answered[number] += row.samples
            if row.samples and self.answered[number] == self.end[number]:
                ended.add(number)
        self.ended += sorted(ended)
        self.scheduler.done(batch, ended)
        return batch

    def check(self, batch: Batch | None, running: tuple[int, ...]) -> None:
        limits = self.scheduler.limits
        assert len(running) <= limits.rows
        assert sum(self.total[number] for number in running) == self.scheduler.reserved
        assert self.scheduler.reserved <= limits.cached_tokens
        names = {self.adapter[number] for number in running} - {None}
        assert len(names) <= limits.slots
        assert set(self.scheduler.slots) == names
        assert not {*running} & (self.gone | {*self.ended})
        if batch is None:
            assert not running
            assert not self.scheduler.waiting, "nothing waits while nothing runs"
            return
        assert 0 < batch.tokens <= limits.step_tokens
        assert len({row.request for row in batch.rows}) == len(batch.rows)
        assert [row.slot for row in batch.rows] == sorted(row.slot for row in batch.rows)
        slots = self.scheduler.slots
        for row in batch.rows:
            assert row.adapter == self.adapter[row.request]
            assert row.slot == (0 if row.adapter is None else slots[row.adapter])
            assert row.slot <= limits.slots
        taking_part = {row.request for row in batch.rows}
        for number in running:
            if self.prompt[number] <= self.cached[number]:
                assert number in taking_part, "no answer waits for another's prompt"


@settings(max_examples=150, deadline=None)
@given(limits, arrivals)
def test_every_request_is_answered_once_and_no_cap_is_passed(
    limits: Limits, arrivals: list[tuple[int, str | None, int, int, int, int | None]]
) -> None:
    world = World(Scheduler(limits))
    leaving: dict[int, list[int]] = {}
    now, accepted, work = 0, [], 0
    for number, (wait, adapter, prompt, answer, end, cancelled) in enumerate(arrivals):
        for _ in range(wait):
            for other in leaving.pop(now, []):
                world.leave(other)
            world.step()
            now += 1
        if world.come(number, adapter, prompt, answer, end):
            accepted.append(number)
            work += prompt + answer
            if cancelled is not None:
                leaving.setdefault(now + cancelled, []).append(number)
    for _ in range(work + 1):  # at least one token a step
        for other in leaving.pop(now, []):
            world.leave(other)
        now += 1
        if world.step() is None and not leaving:
            break
    assert world.scheduler.next() is None
    assert sorted([*world.ended, *world.gone]) == accepted
    assert world.scheduler.reserved == 0
    assert world.scheduler.slots == {}
    for number in world.ended:
        assert world.answered[number] == world.end[number]
    in_order(world, limits.patience)


def in_order(world: World, patience: int) -> None:
    """First come, first served within an adapter; and nobody is overtaken too often."""
    place = {number: index for index, number in enumerate(world.entered)}
    for number in world.entered:
        before = [other for other in world.entered[: place[number]] if other > number]
        assert len(before) <= patience
        assert all(world.adapter[other] != world.adapter[number] for other in before)


def drained(scheduler: Scheduler, answers: dict[int, int] | None = None) -> list[int]:
    """Requests in the order they ended, each after so many tokens (1 if nothing is said)."""
    ended: list[int] = []
    count: Counter[int] = Counter()
    for _ in range(1000):
        batch = scheduler.next()
        if batch is None:
            break
        count.update(row.request for row in batch.rows if row.samples)
        sampled = [row.request for row in batch.rows if row.samples]
        now = [number for number in sampled if count[number] == (answers or {}).get(number, 1)]
        scheduler.done(batch, now)
        ended += now
    return ended


def test_a_rare_adapter_is_not_starved_by_a_popular_one() -> None:
    scheduler = Scheduler(Limits(rows=2, slots=1, step_tokens=64, patience=3))
    for number in range(4):
        scheduler.submit(number, "popular", 4, 2)
    scheduler.submit(4, "rare", 4, 2)
    for number in range(5, 30):
        scheduler.submit(number, "popular", 4, 2)
    staggered = dict.fromkeys(range(1, 30), 2)  # one of the two rows is always taken
    assert drained(scheduler, staggered)[:9] == [0, 1, 2, 3, 5, 6, 7, 4, 8]
    assert scheduler.waiting == 0


def test_requests_of_the_base_need_no_slot() -> None:
    scheduler = Scheduler(Limits(rows=4, slots=1, step_tokens=64, patience=8))
    for number, name in enumerate(["a", "b", None, "a"]):
        scheduler.submit(number, name, 2, 2)
    batch = scheduler.next()
    assert batch is not None
    assert [(row.request, row.slot) for row in batch.rows] == [(2, 0), (0, 1), (3, 1)]


def test_a_long_prompt_does_not_stop_the_answers() -> None:
    scheduler = Scheduler(Limits(rows=4, slots=1, step_tokens=10))
    scheduler.submit(0, None, 1, 50)
    batch = scheduler.next()
    assert batch is not None
    scheduler.done(batch)
    scheduler.submit(1, None, 35, 1)
    counts = []
    for _ in range(4):
        batch = scheduler.next()
        assert batch is not None
        counts.append({row.request: (row.start, row.count, row.samples) for row in batch.rows})
        scheduler.done(batch, [1] if counts[-1][1][2] else [])
    assert [step[0] for step in counts] == [(n, 1, True) for n in range(1, 5)]
    assert [step[1] for step in counts] == [
        (0, 9, False),
        (9, 9, False),
        (18, 9, False),
        (27, 8, True),
    ]


def test_a_cancelled_request_frees_its_place_at_once() -> None:
    scheduler = Scheduler(Limits(rows=1, slots=1, cached_tokens=20, step_tokens=64))
    scheduler.submit(0, "a", 10, 10)
    scheduler.submit(1, "b", 10, 10)
    batch = scheduler.next()
    assert batch is not None
    assert scheduler.cancel(0)
    assert scheduler.reserved == 0
    scheduler.done(batch, [0])  # it was being computed: nothing happens
    after = scheduler.next()
    assert after is not None
    assert [(row.request, row.start) for row in after.rows] == [(1, 0)]
    assert not scheduler.cancel(0)


def test_a_full_queue_and_impossible_requests_are_refused_and_leave_nothing() -> None:
    scheduler = Scheduler(Limits(rows=1, slots=1, context=8, queue=1, step_tokens=4))
    with pytest.raises(RequestRefused) as error:
        scheduler.submit(0, None, 0, 0)
    assert len(error.value.faults) == 2
    with pytest.raises(RequestRefused, match="at most 8 have room"):
        scheduler.submit(0, None, 7, 2)
    scheduler.submit(0, None, 7, 1)
    with pytest.raises(Overloaded, match="1 requests wait"):
        scheduler.submit(1, None, 1, 1)
    with pytest.raises(ValueError, match="here already"):
        scheduler.submit(0, None, 1, 1)
    assert drained(scheduler) == [0]


def test_impossible_limits_are_named_all_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        Limits(rows=8, slots=0, queue=-1, step_tokens=8)
    assert len(error.value.faults) == 3
    assert "step_tokens is 8, and must be more than rows (8)" in str(error.value)


def test_a_step_must_be_said_to_be_done_as_it_was_given() -> None:
    scheduler = Scheduler(Limits(rows=1, slots=1, step_tokens=4))
    scheduler.submit(0, None, 2, 1)
    batch = scheduler.next()
    assert batch is not None
    with pytest.raises(ValueError, match="did not end"):
        scheduler.done(batch)
    with pytest.raises(ValueError, match="is at 2, not 0"):
        scheduler.done(batch)


def test_an_adapter_that_is_coming_holds_up_nobody_and_its_requests_keep_their_place() -> None:
    standing: dict[str, Standing] = {"cold": "coming", "warm": "here"}
    limits = Limits(rows=1, slots=1, step_tokens=64, patience=2)
    scheduler = Scheduler(limits, standing.__getitem__)
    scheduler.submit(0, "cold", 4, 1)
    for number in range(1, 9):
        scheduler.submit(number, "warm", 4, 1)
    ended: list[int] = []
    while len(ended) < 8:
        batch = scheduler.next()
        assert batch is not None
        ended += [row.request for row in batch.rows]
        scheduler.done(batch, ended[-1:])
        if len(ended) == 5:
            standing["cold"] = "here"
    assert ended == [1, 2, 3, 4, 5, 0, 6, 7]
    assert scheduler.wanted() == []


def test_who_has_no_room_yet_is_overtaken_only_so_often() -> None:
    standing: dict[str, Standing] = {"first": "away", "second": "away", "warm": "here"}
    limits = Limits(rows=1, slots=2, step_tokens=64, patience=2)
    scheduler = Scheduler(limits, standing.__getitem__)
    scheduler.submit(0, "second", 4, 1)
    scheduler.submit(1, "first", 4, 1)
    for number in range(2, 9):
        scheduler.submit(number, "warm", 4, 1)
    assert scheduler.wanted() == ["second", "first"]
    assert drained(scheduler) == [2, 3]
    assert scheduler.since("second") == 0
    standing["second"] = "here"
    assert drained(scheduler) == [0], "they went before the next that waits, too"
    standing["warm"], standing["first"] = "leaving", "coming"
    assert scheduler.next() is None
    standing["warm"], standing["first"] = "away", "here"
    assert drained(scheduler) == [1]
    assert scheduler.wanted() == ["warm"]
    assert not scheduler.runs("warm")


def test_tokens_that_are_there_already_are_not_computed() -> None:
    scheduler = Scheduler(Limits(rows=2, slots=1, step_tokens=8, cached_tokens=40))
    scheduler.submit(0, None, 20, 5)
    assert scheduler.admit() == [0]
    with pytest.raises(ValueError, match="cannot skip 20 of 20"):
        scheduler.skip(0, 20)
    scheduler.skip(0, 14)
    assert scheduler.reserved == 25, "they take their room all the same"
    batch = scheduler.batch()
    assert batch is not None
    assert [(row.start, row.count, row.samples) for row in batch.rows] == [(14, 6, True)]
    with pytest.raises(ValueError, match="cannot skip"):
        scheduler.skip(0, 3)
