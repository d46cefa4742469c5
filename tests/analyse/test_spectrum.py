"""The spectrum from thin factors against the dense singular value decomposition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidepath.analyse import Factors, Spectrum, decompose, spectrum
from tests.analyse.kit import any_factors, dense_update


@given(any_factors())
@settings(max_examples=60, deadline=None)
def test_matches_dense_svd_for_every_shape_and_block_structure(factors: Factors) -> None:
    dense = torch.linalg.svdvals(dense_update(factors))
    found = torch.tensor(spectrum(factors).singular_values, dtype=torch.float64)
    width = max(len(dense), len(found))
    pad = torch.nn.functional.pad
    torch.testing.assert_close(
        pad(found, (0, width - len(found))),
        pad(dense, (0, width - len(dense))),
        atol=1e-9,
        rtol=1e-9,
    )
    assert spectrum(factors).norm == pytest.approx(float(dense_update(factors).norm()), abs=1e-9)


def test_effective_rank_is_the_number_of_equal_directions() -> None:
    factors = Factors(torch.eye(4, 10), torch.eye(7, 4), 3.0)
    result = spectrum(factors)
    assert result.singular_values == pytest.approx((3.0,) * 4)
    assert result.effective_rank == pytest.approx(4.0)
    assert result.norm == pytest.approx(6.0)


def test_effective_rank_follows_its_definition() -> None:
    factors = Factors(torch.eye(2, 5), torch.diag(torch.tensor([3.0, 1.0])), 1.0)
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert spectrum(factors).effective_rank == pytest.approx(expected)


def test_fresh_update_has_rank_zero() -> None:
    result = spectrum(Factors(torch.randn(3, 8), torch.zeros(6, 3), 2.0))
    assert (result.effective_rank, result.norm) == (0.0, 0.0)


@given(any_factors())
@settings(max_examples=60, deadline=None)
def test_directions_are_orthonormal_and_build_the_update(factors: Factors) -> None:
    found = decompose(factors)
    rebuilt = (found.U_OK * found.sigma_K) @ found.V_KI
    torch.testing.assert_close(rebuilt, dense_update(factors), atol=1e-10, rtol=1e-10)
    one = torch.eye(len(found.sigma_K), dtype=torch.float64)
    torch.testing.assert_close(found.U_OK.T @ found.U_OK, one, atol=1e-10, rtol=0)
    torch.testing.assert_close(found.V_KI @ found.V_KI.T, one, atol=1e-10, rtol=0)


def test_stable_rank_is_the_energy_in_units_of_the_largest() -> None:
    assert Spectrum((2.0, 2.0, 1.0)).stable_rank == pytest.approx(9 / 4)
    assert Spectrum((5.0, 0.0)).stable_rank == pytest.approx(1.0)
    assert Spectrum((0.0, 0.0)).stable_rank == 0.0


@given(st.lists(st.floats(0, 100), max_size=8), st.floats(0.01, 1.0))
def test_rank_of_an_energy_is_the_first_that_reaches_it(values: list[float], energy: float) -> None:
    ordered = sorted(values, reverse=True)
    total = sum(value * value for value in ordered)
    found = Spectrum(tuple(ordered)).rank_of(energy)
    if total == 0 or total < 1e-200:
        assert found <= len(ordered)
        return
    held = [sum(v * v for v in ordered[:k]) / total for k in range(len(ordered) + 1)]
    assert held[found] >= energy * (1 - 1e-9)
    assert found == 0 or held[found - 1] < energy * (1 + 1e-9)


def test_half_precision_factors_are_read_as_they_are() -> None:
    A, B = torch.randn(3, 8).bfloat16(), torch.randn(6, 3).half()
    found = spectrum(Factors(A, B, 1.0)).singular_values
    assert found == pytest.approx(torch.linalg.svdvals(B.double() @ A.double()).tolist()[:3])
