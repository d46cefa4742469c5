"""Shared subspaces against the paper's formula, and what must hold of any measure of them."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidepath.analyse import Factors, decompose, similarity
from sidepath.analyse.subspace import (
    expected_at_random,
    grassmann_distance,
    grids,
    of_updates,
    random_like,
    shared,
)
from sidepath.errors import StoreError
from tests.analyse.kit import any_factors, drawn


@given(st.integers(1, 5), st.integers(1, 5), st.integers(6, 14), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_similarity_follows_the_papers_formula(r1: int, r2: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first = Factors(torch.randn(r1, width, generator=generator), torch.zeros(4, r1), 1.0)
    second = Factors(torch.randn(r2, width, generator=generator), torch.zeros(4, r2), 1.0)
    U1 = torch.linalg.svd(first.A_RI.double()).Vh.T
    U2 = torch.linalg.svd(second.A_RI.double()).Vh.T
    phi = similarity(first, second)
    for i in range(1, r1 + 1):
        for j in range(1, r2 + 1):
            expected = (U1[:, :i].T @ U2[:, :j]).norm() ** 2 / min(i, j)
            assert phi[i - 1][j - 1] == pytest.approx(float(expected), abs=1e-9)


def test_an_update_shares_all_directions_with_itself() -> None:
    factors = Factors(torch.randn(4, 9), torch.randn(5, 4), 1.0)
    phi = similarity(factors, factors)
    assert all(phi[i][j] == pytest.approx(1.0) for i in range(4) for j in range(4))


def test_different_inputs_are_refused() -> None:
    small = Factors(torch.randn(2, 5), torch.randn(3, 2), 1.0)
    with pytest.raises(StoreError, match="different inputs"):
        similarity(small, Factors(torch.randn(2, 6), torch.randn(3, 2), 1.0))


def test_the_output_side_looks_at_b() -> None:
    first, second = drawn(9, 5, 2, seed=0), drawn(9, 7, 3, seed=1)
    U1 = torch.linalg.svd(first.B_Or).U[:, :2]
    U2 = torch.linalg.svd(second.B_Or).U[:, :3]
    expected = (U1.T @ U2).norm() ** 2 / 2
    assert similarity(first, second, "output")[-1][-1] == pytest.approx(float(expected))
    with pytest.raises(StoreError, match="different outputs"):
        similarity(first, drawn(8, 5, 2, seed=0), "output")


@given(any_factors(), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_updates_are_compared_by_their_own_directions(factors: Factors, seed: int) -> None:
    other = random_like(factors, seed)
    one, two = decompose(factors), decompose(other)
    sides = ((one.V_KI, two.V_KI), (one.U_OK.T, two.U_OK.T))
    for phi, (U, V) in zip(of_updates(factors, other), sides, strict=True):
        for i, j in ((1, 1), (len(U), len(V))):
            slow = float((U[:i] @ V[:j].T).norm() ** 2) / min(i, j)
            assert phi[i - 1][j - 1] == pytest.approx(slow, abs=1e-9)
            assert 0 <= phi[i - 1][j - 1] <= 1


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_one_for_the_same_span_and_zero_for_orthogonal_ones(i: int, more: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))
    mix, _ = torch.linalg.qr(torch.randn(i, i, generator=generator, dtype=torch.float64))
    span = Q[:, :i].T
    assert shared(span, mix @ span)[-1][-1] == pytest.approx(1.0)
    assert shared(span, Q[:, i : i + more].T)[-1][-1] == pytest.approx(0.0, abs=1e-12)
    assert shared(span, Q[:, : i + more].T)[-1][-1] == pytest.approx(1.0), "it lies in the larger"


@pytest.mark.parametrize(("i", "j", "d"), [(1, 1, 20), (2, 8, 40), (8, 8, 40)])
def test_random_spaces_share_what_is_expected(i: int, j: int, d: int) -> None:
    found = [
        similarity(drawn(2, d, i, seed), drawn(2, d, j, seed + 10_000))[-1][-1]
        for seed in range(300)
    ]
    error = statistics.stdev(found) / math.sqrt(len(found))
    assert abs(statistics.mean(found) - expected_at_random(i, j, d)) < 4 * error


def test_distance_follows_from_the_cosines_of_the_angles() -> None:
    first, second = drawn(2, 9, 3, seed=0), drawn(2, 9, 4, seed=1)
    phi = similarity(first, second)[-1][-1]
    U1 = torch.linalg.svd(first.A_RI, full_matrices=False).Vh
    U2 = torch.linalg.svd(second.A_RI, full_matrices=False).Vh
    cosines = torch.linalg.svdvals(U1 @ U2.T)
    expected = math.sqrt(float((1 - cosines.square()).sum()))
    assert grassmann_distance(phi, 3, 4) == pytest.approx(expected)
    assert grassmann_distance(1.0, 3, 4) == 0.0
    assert grassmann_distance(0.0, 3, 4) == pytest.approx(math.sqrt(3))


def test_the_control_has_the_same_shapes_and_follows_its_seed() -> None:
    factors = drawn(6, 5, 2, seed=3)
    control = random_like(factors, 1)
    assert (control.A_RI.shape, control.B_Or.shape) == (factors.A_RI.shape, factors.B_Or.shape)
    assert torch.equal(control.A_RI, random_like(factors, 1).A_RI)
    assert not torch.equal(control.A_RI, random_like(factors, 2).A_RI)


def test_an_update_that_changes_nothing_shares_no_directions_but_those_of_a() -> None:
    trained = drawn(6, 5, 2, seed=3)
    fresh = Factors(trained.A_RI, torch.zeros_like(trained.B_Or), 1.0)
    found = grids(trained, fresh)
    assert found["A"][-1][-1] == pytest.approx(1.0)
    assert found["B"] == found["inputs"] == found["outputs"] == []
    both = grids(trained, trained)
    assert all(both[name][-1][-1] == pytest.approx(1.0) for name in ("B", "inputs", "outputs"))
    assert both["random"] != grids(trained, drawn(6, 5, 2, seed=4))["A"]
