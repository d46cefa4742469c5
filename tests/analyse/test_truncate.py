"""Updates at lower ranks: the nearest there is, and exactly as far away as is said."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidepath.analyse import Factors, Keep, Spectrum, truncate
from tests.analyse.kit import any_factors, dense_update, drawn


@given(any_factors(), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_nearest_of_its_rank_and_the_error_is_exact(factors: Factors, r: int) -> None:
    dW = dense_update(factors)
    found = truncate(factors, Keep(r=r))
    product = found.B_OK @ found.A_KI
    U, sigma, V = torch.linalg.svd(dW, full_matrices=False)
    nearest = (U[:, :r] * sigma[:r]) @ V[:r]
    assert found.r == min(r, factors.A_RI.shape[0], *factors.shape)
    assert float((dW - product).norm()) == pytest.approx(found.error, abs=1e-9)
    assert float((dW - nearest).norm()) == pytest.approx(found.error, abs=1e-9)
    assert float(dW.norm()) == pytest.approx(found.norm)


@given(st.integers(1, 3), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_exact_when_the_true_rank_is_lower(rank: int, seed: int) -> None:
    thin = drawn(9, 11, rank, seed, 0.7)
    mix = drawn(6, 1, rank, seed + 1).B_Or  # six ranks, of which `rank` are real
    factors = Factors(mix @ thin.A_RI, thin.B_Or @ torch.linalg.pinv(mix), 0.7)
    found = truncate(factors, Keep(r=rank))
    torch.testing.assert_close(found.B_OK @ found.A_KI, dense_update(thin), atol=1e-9, rtol=1e-9)
    assert found.error == pytest.approx(0.0, abs=1e-9)
    assert truncate(factors, Keep(energy=1.0 - 1e-9)).r <= rank


def test_energy_keeps_the_fewest_directions_that_hold_it() -> None:
    sigma = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    factors = Factors(torch.eye(3, 7), torch.eye(5, 3) * sigma, 1.0)
    assert truncate(factors, Keep(energy=9 / 14)).r == 1
    assert truncate(factors, Keep(energy=0.65)).r == 2
    assert truncate(factors, Keep(energy=0.99)).r == 3
    assert truncate(factors, Keep(r=2, energy=0.99)).r == 2


def test_a_zero_update_keeps_one_direction_of_nothing() -> None:
    found = truncate(Factors(torch.randn(4, 6), torch.zeros(5, 4), 1.0), Keep(energy=0.99))
    assert (found.r, found.norm, found.error) == (1, 0.0, 0.0)
    assert Keep().rank(Spectrum((1.0, 1.0))) == 2
