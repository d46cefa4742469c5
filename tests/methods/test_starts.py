"""Starts that look at the weight: the nearest factors, and LoftQ's alternation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sidepath.core.quant import nearest_levels
from sidepath.core.views import view_of
from sidepath.methods.base import Site
from sidepath.methods.lora import LoRA
from sidepath.methods.starts import best_factors, loftq


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), rank=st.integers(1, 12))
def test_the_factors_are_the_nearest_of_their_rank(rows: int, columns: int, rank: int) -> None:
    M = torch.randn(rows, columns, dtype=torch.float64)
    A, B = best_factors(M, rank)
    assert (A.shape, B.shape) == ((rank, columns), (rows, rank))
    singular = torch.linalg.svdvals(M)
    left = (M - B @ A).norm()
    torch.testing.assert_close(left, singular[rank:].norm(), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(A @ A.T, B.T @ B, atol=1e-9, rtol=1e-9)


def test_each_iteration_is_nearer() -> None:
    """Algorithm 1: quantise what the factors leave, then fit the factors to what that lost."""
    W = torch.randn(96, 128) @ torch.diag(torch.linspace(2, 0.1, 128))
    errors = [float((nearest_levels(W) - W).norm())]
    for iterations in (1, 2, 5):
        A, B, Q = loftq(W, nearest_levels, r=8, iterations=iterations)
        errors.append(float((Q + B @ A - W).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.95 * errors[0]


def test_over_a_fixed_base_the_first_iteration_is_the_last() -> None:
    W = torch.randn(32, 64)
    Q = nearest_levels(W)
    once, more = (loftq(W, lambda _: Q, 4, iterations) for iterations in (1, 4))
    assert all(torch.equal(one, other) for one, other in zip(once, more, strict=True))


@pytest.mark.parametrize("parts", [(), ((0, 8), (16, 24))])
@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)"])
def test_a_delta_starts_at_a_matrix(parts: tuple[tuple[int, int], ...], scaling: str) -> None:
    layer = nn.Linear(20, 24).double()
    view = view_of(layer)
    assert view is not None
    config = LoRA(r=3, alpha=5, scaling=scaling, dtype="base", start="loftq")  # type: ignore[arg-type]
    delta = config.dense_delta(Site("c", "dense", parts), view)
    M = torch.randn(24, 20, dtype=torch.float64)
    delta.start_at_(M)
    found = delta.matrix(24, torch.float64)
    for start, stop in parts or ((0, 24),):
        A, B = best_factors(M[start:stop], 3)
        torch.testing.assert_close(found[start:stop], B @ A, atol=1e-9, rtol=1e-9)
    outside = [row for row in range(24) if parts and not any(a <= row < b for a, b in parts)]
    assert not found[outside].any()
