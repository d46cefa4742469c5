"""The nearest thin factors of a whole matrix, against the dense decomposition."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sidepath.analyse import Keep, Spectrum
from sidepath.combining import dense
from sidepath.combining.dense import frobenius, nearest


def matrix(rows: int, columns: int, sigma: Tensor, seed: int) -> Tensor:
    """A matrix of these singular values, in random directions."""
    generator = torch.Generator().manual_seed(seed)
    sides = [
        torch.linalg.qr(torch.randn(n, len(sigma), generator=generator, dtype=torch.float64)).Q
        for n in (rows, columns)
    ]
    product: Tensor = (sides[0] * sigma) @ sides[1].T
    return product


def optimal(M: Tensor, r: int) -> float:
    return float(torch.linalg.svdvals(M)[r:].norm())


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 8), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_small_matrices_exactly(rows: int, columns: int, r: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    M = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    found = nearest(M, Keep(r=r), 0)
    assert found.r == min(r, rows, columns)
    assert float((M - found.B_OK @ found.A_KI).norm()) == pytest.approx(found.error, abs=1e-10)
    assert found.error == pytest.approx(optimal(M, r), abs=1e-9)
    assert found.norm == pytest.approx(float(M.norm()))


@given(st.integers(100, 160), st.integers(100, 160), st.integers(1, 8), st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_the_sketch_is_as_near_as_the_dense_one(rows: int, columns: int, r: int, seed: int) -> None:
    """Also where the singular values hardly fall, as those of noise do."""
    for decay in (0.5, 0.97):
        sigma = decay ** torch.arange(min(rows, columns), dtype=torch.float64)
        M = matrix(rows, columns, sigma, seed)
        with mock.patch.object(dense, "EXACT", 0), mock.patch.object(dense, "_exact", never):
            found = nearest(M, Keep(r=r), seed)
            assert torch.equal(nearest(M, Keep(r=r), seed).A_KI, found.A_KI)
        assert found.error <= 1.001 * optimal(M, r) + 1e-12
        assert found.error == pytest.approx(float((M - found.B_OK @ found.A_KI).norm()), rel=1e-6)


def never(_: Tensor) -> None:
    raise AssertionError("decomposed as a whole")


@given(st.floats(0.3, 0.9999), st.floats(0.6, 0.99), st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_energy_takes_as_many_directions_as_the_dense_one(
    energy: float, decay: float, seed: int
) -> None:
    sigma = decay ** torch.arange(120, dtype=torch.float64)
    M = matrix(140, 120, sigma, seed)
    spectrum = Spectrum(tuple(torch.linalg.svdvals(M).tolist()))
    with mock.patch.object(dense, "EXACT", 0), mock.patch.object(dense, "_FIRST", 20):
        found = nearest(M, Keep(energy=energy), seed)
        capped = nearest(M, Keep(r=3, energy=energy), seed)
    assert found.error**2 <= (1 - energy) * found.norm**2 * (1 + 1e-6)
    assert abs(found.r - spectrum.rank_of(energy)) <= 1
    assert capped.r == min(3, found.r)


def test_large_float32_matrices_are_sketched_and_planted_ranks_found() -> None:
    torch.manual_seed(0)
    B, A = torch.randn(700, 5), torch.randn(5, 300)
    M = B @ A
    with mock.patch.object(dense, "_exact", never):
        found = nearest(M, Keep(r=5), 0)
        by_energy = nearest(M, Keep(energy=0.999999), 0)
    assert (found.r, by_energy.r) == (5, 5)
    assert found.error < 1e-5 * found.norm


def test_a_zero_matrix_keeps_one_direction_of_nothing() -> None:
    for shape in ((5, 4), (400, 300)):
        found = nearest(torch.zeros(shape), Keep(energy=0.9), 0)
        assert (found.r, found.error, found.norm) == (1, 0.0, 0.0)


def test_the_norm_of_anything() -> None:
    assert frobenius(torch.tensor(3.0)) == 3.0
    assert frobenius(torch.ones(3, 3, dtype=torch.bfloat16)) == 3.0
