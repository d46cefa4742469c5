"""The spectrum from thin factors against the dense singular value decomposition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidepath.analyse import Factors, similarity, spectrum
from sidepath.errors import StoreError


def dense_update(factors: Factors) -> torch.Tensor:
    """Slow reference: ΔW built row range by row range."""
    sizes = factors.sizes or (factors.B_Or.shape[0],)
    r, start, rows = factors.r, 0, []
    for part, size in enumerate(sizes):
        B = factors.B_Or[start : start + size].double()
        A = factors.A_RI[part * r : (part + 1) * r].double()
        rows.append(factors.scaling * B @ A)
        start += size
    return torch.cat(rows)


@st.composite
def factors_strategy(draw: st.DrawFn) -> Factors:
    r = draw(st.integers(1, 6))
    columns = draw(st.integers(1, 12))
    sizes = tuple(draw(st.lists(st.integers(1, 9), min_size=0, max_size=3)))
    whole = draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, parts = (sum(sizes), len(sizes)) if sizes else (whole, 1)
    return Factors(
        torch.randn(parts * r, columns, generator=generator),
        torch.randn(rows, r, generator=generator),
        draw(st.sampled_from([0.5, 2.0, -1.0])),
        sizes,
    )


@given(factors_strategy())
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
