"""Singular values of many low-rank products at once against the dense decomposition of each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sidepath.kernels.spectra import effective_rank, gram_singular_values, grams


def dense(A_RI: Tensor, B_Or: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Slow reference: the update built row range by row range."""
    r, start, rows = B_Or.shape[1], 0, []
    for part, size in enumerate(sizes or (len(B_Or),)):
        rows.append(B_Or[start : start + size] @ A_RI[part * r : (part + 1) * r])
        start += size
    return torch.cat(rows)


@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 4),
    r=st.integers(1, 6),
    columns=st.integers(1, 12),
    rows=st.integers(1, 12),
    sizes=st.lists(st.integers(1, 9), max_size=3).map(tuple),
    rank=st.integers(0, 6),
)
@settings(max_examples=60, deadline=None)
def test_they_are_those_of_the_dense_products(
    seed: int, count: int, r: int, columns: int, rows: int, sizes: tuple[int, ...], rank: int
) -> None:
    """Whatever the shape, and for products whose rank is below that of the factors."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A_NRI = drawn(count, max(1, len(sizes)) * r, columns)
    B_NOr = drawn(count, sum(sizes) or rows, r)
    B_NOr[..., rank:] = 0.0  # fewer directions than the rank; none at all at rank 0
    found_NR = gram_singular_values(*grams(A_NRI, B_NOr, sizes)).flip(-1)
    for A_RI, B_Or, found_R in zip(A_NRI, B_NOr, found_NR, strict=True):
        update_OI = dense(A_RI, B_Or, sizes)
        expected = torch.linalg.svdvals(update_OI)[: len(found_R)]
        expected = torch.nn.functional.pad(expected, (0, len(found_R) - len(expected)))
        largest = max(1.0, float(expected[0]))
        torch.testing.assert_close(found_R, expected, atol=1e-7 * largest, rtol=0)
        share = expected / expected.sum().clamp_min(1e-300)
        entropy = -sum(float(p) * float(p.log()) for p in share if p > 1e-14)
        wanted = torch.tensor(entropy).exp().item() if float(expected[0]) > 0 else 0.0
        assert float(effective_rank(found_R)) == pytest.approx(wanted, abs=2e-5)


def test_half_precision_factors_are_widened_first() -> None:
    A_NRI, B_NOr = torch.randn(1, 3, 8).bfloat16(), torch.randn(1, 6, 3).half()
    found = gram_singular_values(*grams(A_NRI, B_NOr))
    expected = torch.linalg.svdvals(B_NOr[0].double() @ A_NRI[0].double())[:3].flip(0)
    torch.testing.assert_close(found[0], expected, atol=1e-7, rtol=1e-7)


def test_a_product_that_is_not_finite_leaves_the_others_alone() -> None:
    A_NRI, B_NOr = torch.randn(3, 2, 5), torch.randn(3, 4, 2)
    B_NOr[1, 0, 0] = torch.inf
    found = effective_rank(gram_singular_values(*grams(A_NRI, B_NOr)))
    assert found.isfinite().tolist() == [True, False, True]
    alone = effective_rank(gram_singular_values(*grams(A_NRI[:1], B_NOr[:1])))
    torch.testing.assert_close(found[:1], alone)


@pytest.mark.parametrize(
    ("values", "rank"),
    [((2.0, 2.0, 2.0), 3.0), ((5.0, 0.0), 1.0), ((0.0, 0.0), 0.0), ((), 0.0)],
)
def test_effective_rank_counts_equal_directions(values: tuple[float, ...], rank: float) -> None:
    assert float(effective_rank(torch.tensor(values))) == pytest.approx(rank)
