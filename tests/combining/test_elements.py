"""TIES and DARE against loops over single elements."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sidepath.combining.elements import dropped, elected, linear, put_together, trimmed

SHAPES = st.tuples(st.integers(1, 7), st.integers(1, 7))


def drawn(shape: tuple[int, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@given(SHAPES, st.floats(0.01, 1.0), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_trimming_keeps_the_largest(shape: tuple[int, int], density: float, seed: int) -> None:
    update = drawn(shape, seed)
    kept = math.ceil(density * update.numel())
    largest = sorted(update.flatten().tolist(), key=abs, reverse=True)[:kept]
    found = trimmed(update, density)
    assert sorted(found[found != 0].tolist()) == sorted(largest)
    assert torch.equal(found[found != 0], update[found != 0])


def test_trimming_keeps_elements_that_are_equal_to_the_last() -> None:
    update = torch.tensor([[2.0, -1.0, 1.0, 0.5]])
    assert trimmed(update, 0.5).tolist() == [[2.0, -1.0, 1.0, 0.0]]


@given(st.integers(1, 4), SHAPES, st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_election_and_disjoint_mean(count: int, shape: tuple[int, int], seed: int) -> None:
    updates = [trimmed(drawn(shape, seed + n), 0.6) for n in range(count)]
    found = elected(updates)
    for row in range(shape[0]):
        for column in range(shape[1]):
            values = [float(update[row, column]) for update in updates]
            total = sum(values)
            agree = [value for value in values if value * total > 0]
            expected = sum(agree) / len(agree) if agree else 0.0
            assert float(found[row, column]) == pytest.approx(expected, abs=1e-12)


def test_the_election_by_hand() -> None:
    updates = [torch.tensor([3.0, -1.0, 0.0, 1.0]), torch.tensor([-1.0, -3.0, 2.0, -1.0])]
    assert elected(updates).tolist() == [3.0, -2.0, 2.0, 0.0]


def test_dropping_keeps_the_share_and_the_expectation() -> None:
    update = torch.ones(500, 400)
    found = dropped(update, 0.3, seed=5)
    assert found.unique().tolist() == pytest.approx([0.0, 1 / 0.3])
    share = float((found != 0).double().mean())
    deviation = math.sqrt(0.3 * 0.7 / update.numel())
    assert abs(share - 0.3) < 5 * deviation
    assert torch.equal(found, dropped(update, 0.3, seed=5))
    assert not torch.equal(found, dropped(update, 0.3, seed=6))
    assert torch.equal(dropped(update, 1.0, seed=5), update)


@pytest.mark.parametrize("kind", ["ties", "dare", "dare-ties"])
def test_one_update_alone_is_itself(kind: str) -> None:
    update = drawn((4, 5), 0)
    assert put_together([update], kind, 0.2, ("x",)) is update


def test_each_update_is_dropped_by_a_draw_of_its_own() -> None:
    update = torch.ones(40, 40)
    found = put_together([update, -update], "dare", 0.5, (0, "layer"))
    assert bool((found != 0).any()), "equal draws would cancel"
    again = put_together([update, -update], "dare", 0.5, (0, "layer"))
    assert torch.equal(found, again)
    assert not torch.equal(found, put_together([update, -update], "dare", 0.5, (0, "other")))


def test_linear_is_in_float64() -> None:
    found = linear([(0.1, torch.ones(2)), (-3.0, torch.ones(2))])
    assert found.tolist() == [0.1 - 3.0] * 2
