"""The token bucket, against what it promises over any stretch of time."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sidepath.serve.rates import Bucket


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_and_then_evenly() -> None:
    clock = Clock()
    bucket = Bucket(3, clock)
    assert [bucket.take() for _ in range(3)] == [0, 0, 0]
    assert bucket.take() == 20
    clock.now += 19
    assert round(bucket.take(), 6) == 1
    clock.now += 1
    assert bucket.take() == 0
    assert bucket.take() > 0
    clock.now += 3600
    assert [bucket.take() > 0 for _ in range(4)] == [False, False, False, True]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.lists(st.integers(0, 40), min_size=1, max_size=60))
def test_never_more_than_promised(rate: int, waits: list[int]) -> None:
    clock = Clock()
    bucket, taken = Bucket(rate, clock), []
    for wait in waits:
        clock.now += wait
        left = bucket.take()
        if not left:
            taken.append(clock.now)
        else:
            clock.now += left + 1e-6
            assert bucket.take() == 0, "it says when to come back"
            taken.append(clock.now)
    for number, start in enumerate(taken):
        within = [moment for moment in taken[number:] if moment < start + 60]
        assert len(within) <= 2 * rate, "a burst, and a minute's worth beside it"
