"""Ways taken in turn, and what is made of their times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sidepath.bench.timing import Clock, Spread, interleaved, pinned_threads, quotients, ratios


class FakeTime:
    """A clock that moves only when an action moves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def taking(self, seconds: float, log: list[str], name: str) -> Callable[[], None]:
        def run() -> None:
            log.append(name)
            self.now += seconds

        return run


def test_ways_are_taken_in_turn_and_warm_ups_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = FakeTime(monkeypatch), list[str]()
    actions = {"a": clock.taking(1.0, log, "a"), "b": clock.taking(2.0, log, "b")}
    found = interleaved(actions, rounds=3, warmup=1)
    assert log == ["a", "b"] * 4
    assert found == {"a": [1.0] * 3, "b": [2.0] * 3}


def test_what_stands_around_a_run_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = FakeTime(monkeypatch), list[str]()
    found = interleaved(
        {"a": clock.taking(1.0, log, "a"), "b": clock.taking(1.0, log, "b")},
        rounds=1,
        warmup=0,
        before={"a": clock.taking(5.0, log, "before")},
        after={"b": clock.taking(7.0, log, "after")},
    )
    assert log == ["before", "a", "b", "after"]
    assert found == {"a": [1.0], "b": [1.0]}


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9))
def test_a_spread_is_the_middle_and_the_ends(values: list[float]) -> None:
    spread = Spread.of(values)
    assert (spread.min, spread.median, spread.max) == (
        sorted(values)[0],
        statistics.median(values),
        sorted(values)[-1],
    )


def test_ratios_are_of_neighbours_not_of_medians() -> None:
    """The machine was ten times as slow in the second round: the ratios do not show it."""
    one, other = [2.0, 20.0, 2.0], [1.0, 10.0, 2.0]
    assert quotients(one, other) == Spread(2.0, 1.0, 2.0)
    assert ratios(one, other) == {"median": 2.0, "min": 1.0, "max": 2.0}


def test_neighbours_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="shorter"):
        quotients([1.0, 2.0], [1.0])


def test_threads_are_pinned_within_the_block() -> None:
    before = torch.get_num_threads()
    with pinned_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_cpu_has_no_peak() -> None:
    clock = Clock(torch.device("cpu"))
    assert clock.seconds("a", lambda: None) >= 0
    assert clock.peak_bytes == {}


def test_on_a_gpu_events_are_read_after_the_device_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CUDA played by a stand-in: the order of calls is what matters."""
    log: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def elapsed_time(self, end: object) -> float:
            log.append("read")
            return 1500.0

    sizes = iter([300, 200])
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "Event", Event)
    monkeypatch.setattr(cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda device: log.append("reset"))
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda device: next(sizes))
    clock = Clock(torch.device("cuda"))
    assert clock.seconds("a", lambda: log.append("run")) == 1.5
    assert log == ["wait", "reset", "record", "run", "record", "wait", "read"]
    clock.seconds("a", lambda: None)
    assert clock.peak_bytes == {"a": 300}, "the most of all runs"
