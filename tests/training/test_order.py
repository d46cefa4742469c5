from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidepath.training.order import Order, pack


def order_of(lengths: list[int], size: int, seed: int = 0, capacity: int | None = None) -> Order:
    return Order(lengths, [(0, len(lengths), 1.0)], size=size, seed=seed, capacity=capacity)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=90),
    size=st.integers(1, 12),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 3),
    capacity=st.sampled_from([None, 60, 100]),
)
def test_every_row_once_an_epoch(
    lengths: list[int], size: int, seed: int, epoch: int, capacity: int | None
) -> None:
    order = order_of(lengths, size, seed, capacity)
    steps = order.epoch(epoch)
    assert sorted(row for step in steps for bin_ in step for row in bin_) == list(
        range(len(lengths))
    )
    assert all(1 <= len(step) <= size for step in steps)
    assert steps == order_of(lengths, size, seed, capacity).epoch(epoch)
    if capacity is None:
        assert len(steps) == -(-len(lengths) // size)
        assert all(len(bin_) == 1 for step in steps for bin_ in step)
    else:
        totals = [sum(lengths[row] for row in bin_) for step in steps for bin_ in step]
        assert max(totals) <= capacity


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60),
    size=st.integers(1, 5),
    capacity=st.sampled_from([None, 30, 64]),
)
def test_a_step_is_found_by_its_number_alone(
    lengths: list[int], size: int, capacity: int | None
) -> None:
    """Against walking through the epochs one after the other."""
    walked = [
        (epoch, bins)
        for epoch in range(4)
        for bins in order_of(lengths, size, capacity=capacity).epoch(epoch)
    ]
    for step in reversed(range(len(walked))):
        order = order_of(lengths, size, capacity=capacity)
        assert order.at(step) == walked[step]
        assert order.place(step)[0] == walked[step][0]
    assert order.steps_of(4) == len(walked)
    assert order.passes(len(walked)) == 4
    first = order.start_of(1)
    assert order.steps_of(0.5) == -(-first // 2)


@pytest.mark.parametrize("capacity", [None, 30])
def test_the_step_with_the_longest_bin(capacity: int | None) -> None:
    lengths = [(7 * row) % 23 + 1 for row in range(50)]
    order = order_of(lengths, 4, capacity=capacity)
    last = order.start_of(1)
    longest = [
        max(sum(lengths[row] for row in bin_) for bin_ in order.at(step)[1]) for step in range(last)
    ]
    for first in range(last):
        found = order.largest(first, last)
        assert first <= found < last
        assert longest[found] == max(longest[first:])
    assert order.largest(last, last) == last, "no step to come"


def test_epochs_and_seeds_differ() -> None:
    lengths = list(range(1, 65))
    orders = [order_of(lengths, 4, seed).epoch(epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(one != other for at, one in enumerate(orders) for other in orders[:at])


def test_rows_of_a_step_have_like_lengths() -> None:
    lengths = [(37 * row) % 101 + 1 for row in range(256)]

    def padding(steps: Sequence[Sequence[tuple[int, ...]]]) -> int:
        longest = [max(lengths[row] for (row,) in step) * len(step) for step in steps]
        return sum(longest) - sum(lengths)

    unsorted = [[(row,) for row in range(start, start + 8)] for start in range(0, 256, 8)]
    assert padding(order_of(lengths, 8).epoch(0)) < 0.4 * padding(unsorted)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    weights=st.lists(st.floats(0.01, 5), min_size=4, max_size=4),
    epochs=st.integers(1, 4),
)
def test_weights_are_shares_of_each_epoch(
    counts: list[int], weights: list[float], epochs: int
) -> None:
    total = sum(counts)
    stops = np.cumsum(counts).tolist()
    parts = [
        (stop - count, stop, weight)
        for count, stop, weight in zip(counts, stops, weights, strict=False)
    ]
    order = Order([1] * total, parts, size=3, seed=1)
    seen: Counter[int] = Counter()
    for epoch in range(epochs):
        rows = [row for step in order.epoch(epoch) for bin_ in step for row in bin_]
        assert len(rows) == total
        for start, stop, weight in parts:
            drawn = sum(start <= row < stop for row in rows)
            wanted = total * weight / sum(weight for *_, weight in parts)
            assert abs(drawn - wanted) < 1
        seen.update(rows)
    for start, stop, _ in parts:
        uses = [seen[row] for row in range(start, stop)]
        assert max(uses) - min(uses) <= 1, "a part's rows take turns, across epochs too"


def test_parts_weighted_by_their_rows_give_each_row_once() -> None:
    parts = [(0, 3, 3 / 71), (3, 10, 7 / 71), (10, 71, 61 / 71)]
    order = Order([1] * 71, parts, size=4, seed=5)
    for epoch in range(3):
        rows = sorted(row for step in order.epoch(epoch) for (row,) in step)
        assert rows == list(range(71))


def test_packing_leaves_little_room() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(5, 200, size=10_000)
    bins = pack(generator.permutation(10_000), lengths, 512)
    assert sum(map(len, bins)) == 10_000
    assert lengths.sum() / (512 * len(bins)) > 0.98


def test_a_row_beyond_the_capacity_stands_alone() -> None:
    assert sorted(pack([0, 1, 2], np.array([9, 2, 3]), 5)) == [(0,), (2, 1)]


@pytest.mark.parametrize("capacity", [None, 8])
def test_fewer_rows_than_a_step(capacity: int | None) -> None:
    order = order_of([3, 4, 5], 16, capacity=capacity)
    assert order.start_of(1) == 1
    assert order.passes(3) == 3


def test_a_part_of_an_epoch_is_not_rounded_up_for_a_float_s_sake() -> None:
    assert [order_of([3] * 40, 4).steps_of(epochs) for epochs in (1.1, 1.11, 0.3)] == [11, 12, 3]
