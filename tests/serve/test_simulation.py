"""Simulated time: cases that can be worked out by hand, and the books in general."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidepath.errors import RequestRefused
from sidepath.serve.scheduler import Limits
from sidepath.serve.simulation import Arrival, Costs, simulate


def test_one_request_by_hand() -> None:
    """A prompt of 10 in pieces of 4, 4, 2, then two tokens more: five steps."""
    costs = Costs(step=1.0, row=0.1, token=0.01, adapter=0.5)
    found = simulate(
        Limits(rows=1, slots=1, step_tokens=4), costs, [Arrival(7.0, "a", prompt=10, answer=3)]
    )
    assert found.steps == 5
    assert found.tokens == 12
    assert found.first_token == pytest.approx((3 * 1.6 + 0.10,))
    assert found.last_token == pytest.approx((5 * 1.6 + 0.12,))
    assert found.seconds == pytest.approx(found.last_token[0])
    assert found.requests_per_second == pytest.approx(1 / found.seconds)


def test_rows_share_steps() -> None:
    arrivals = [Arrival(0.0, None, 1, 10) for _ in range(8)]
    alone = simulate(Limits(rows=1, step_tokens=16), Costs(step=1.0), arrivals)
    together = simulate(Limits(rows=8, step_tokens=16), Costs(step=1.0), arrivals)
    assert (alone.steps, together.steps) == (80, 10)


def test_an_idle_engine_waits_for_the_next_arrival() -> None:
    found = simulate(
        Limits(rows=2, step_tokens=16),
        Costs(step=1.0),
        [Arrival(100.0, None, 1, 1), Arrival(0.0, "a", 1, 1)],
    )
    assert found.last_token == (1.0, 1.0)
    assert found.seconds == 101.0


def test_what_is_turned_away_is_counted_and_what_never_fits_is_an_error() -> None:
    limits = Limits(rows=1, queue=1, context=8, step_tokens=16)
    arrivals = [Arrival(0.0, None, 1, 4), Arrival(0.0, None, 1, 4), Arrival(0.5, None, 1, 4)]
    found = simulate(limits, Costs(step=1.0), arrivals)
    assert found.turned_away == 1
    assert [math.isinf(at) for at in found.last_token] == [False, True, False]
    with pytest.raises(RequestRefused):
        simulate(limits, Costs(step=1.0), [Arrival(0.0, None, 8, 8)])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(0, 20),
            st.sampled_from([None, *"abcdef"]),
            st.integers(1, 20),
            st.integers(1, 8),
        ),
        max_size=30,
    ),
    st.integers(1, 4),
    st.integers(1, 6),
)
def test_every_token_is_computed_once(
    given: list[tuple[float, str | None, int, int]], slots: int, rows: int
) -> None:
    arrivals = [Arrival(*each) for each in given]
    found = simulate(Limits(rows=rows, slots=slots, step_tokens=10), Costs(step=1.0), arrivals)
    assert found.tokens == sum(each.prompt + each.answer - 1 for each in arrivals)
    assert found.adapters <= found.steps * slots
    assert all(
        first <= last < math.inf
        for first, last in zip(found.first_token, found.last_token, strict=True)
    )


def test_nobody_starves_under_a_popular_adapter() -> None:
    """A rare adapter's request comes amid a stream that alone would keep the slot for ever."""
    stream = [Arrival(0.4 * number, "popular", 4, 4) for number in range(400)]
    rare = Arrival(20.0, "rare", 4, 4)
    limits = Limits(rows=4, slots=1, step_tokens=64, patience=16)
    found = simulate(limits, Costs(step=0.1), [*stream, rare])
    place = sorted([*stream, rare], key=lambda arrival: arrival.at).index(rare)
    assert found.last_token[place] < 16 * 0.4 + 4
