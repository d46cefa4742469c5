"""One layer's update out of several: sums of products, whatever the ranks, scalings and weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sidepath.analyse import Factors
from sidepath.combining.layers import combined, stacked
from sidepath.combining.recipe import Combination
from tests.analyse.kit import dense_update, drawn

Weighed = list[tuple[float, Factors]]


@st.composite
def several(draw: st.DrawFn) -> Weighed:
    """Updates of one matrix: other ranks (above the matrix's too), scalings and weights, not 0."""
    rows, columns = draw(st.integers(1, 10)), draw(st.integers(1, 10))
    number = st.floats(-3, 3).filter(lambda value: abs(value) > 1e-3)
    return [
        (
            draw(number),
            drawn(rows, columns, draw(st.integers(1, 5)), draw(st.integers(0, 2**31)), scaling),
        )
        for scaling in draw(st.lists(st.floats(0.01, 20), min_size=1, max_size=4))
    ]


def wanted(carriers: Weighed) -> Tensor:
    return torch.stack([weight * dense_update(factors) for weight, factors in carriers]).sum(0)


@given(several())
@settings(max_examples=60, deadline=None)
def test_the_stack_is_the_sum(carriers: Weighed) -> None:
    found = stacked(carriers)
    assert found.r == sum(factors.r for _, factors in carriers)
    assert found.scaling > 0
    torch.testing.assert_close(dense_update(found), wanted(carriers), atol=1e-9, rtol=1e-9)


@given(several(), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_svd_is_the_nearest_of_its_rank(carriers: Weighed, r: int) -> None:
    total = wanted(carriers)
    found = combined("layer", carriers, Combination(kind="svd", r=r))
    assert found.factors.r <= r
    error = float((total - dense_update(found.factors)).norm())
    assert error == pytest.approx(found.error, abs=1e-8)
    assert error == pytest.approx(float(torch.linalg.svdvals(total)[r:].norm()), abs=1e-8)
    assert found.norm == pytest.approx(float(total.norm()), abs=1e-9)


@given(several(), st.sampled_from(["ties", "dare", "dare-ties"]), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_without_trimming_every_kind_sees_whole_updates(
    carriers: Weighed, kind: str, seed: int
) -> None:
    """At density 1 nothing is drawn: DARE is the sum, TIES the mean of those that agree."""
    recipe = Combination(kind=kind, r=10, density=1.0, seed=seed)  # type: ignore[arg-type]
    found = dense_update(combined("layer", carriers, recipe).factors)
    updates = torch.stack([weight * dense_update(factors) for weight, factors in carriers])
    expected = updates.sum(0)
    if kind != "dare" and len(carriers) > 1:
        agree = updates.sign() == expected.sign()
        expected = (updates * agree).sum(0) / agree.sum(0).clamp(min=1)
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-8)


def test_one_update_at_weight_1_keeps_its_very_factors() -> None:
    factors = drawn(7, 5, 3, seed=1, scaling=0.3)
    found = stacked([(1.0, factors)])
    assert torch.equal(found.A_RI, factors.A_RI)
    assert torch.equal(found.B_Or, factors.B_Or)
    assert found.scaling == factors.scaling
