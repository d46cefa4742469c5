"""One rank and one scale for all: the updates stay what they were."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidepath.convert.folding import one_alpha, one_rank, one_scaling, times
from sidepath.convert.portable import Update

SIZES = st.integers(1, 5)


@st.composite
def some_updates(draw: st.DrawFn) -> dict[str, Update]:
    found = {}
    for number in range(draw(st.integers(1, 4))):
        r, rows, columns = draw(SIZES), draw(SIZES), draw(SIZES)
        seed = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
        found[str(number)] = Update(
            torch.randn(r, columns, generator=seed).to(dtype),
            torch.randn(rows, r, generator=seed).to(dtype),
            draw(st.sampled_from([0.25, 0.5, 1.0, 2.0, 1.5, 0.7, 3.1])),
        )
    return found


def delta(one: Update) -> torch.Tensor:
    """Slow reference: `s B A` in float64."""
    return one.scaling * one.B.double() @ one.A.double()


@settings(deadline=None)
@given(some_updates())
def test_padding_is_exact(updates: dict[str, Update]) -> None:
    padded = one_rank(updates)
    assert len({one.r for one in padded.values()}) == 1
    for path, one in padded.items():
        old = updates[path]
        assert (one.A.dtype, one.scaling) == (old.A.dtype, old.scaling)
        assert torch.equal(one.A[: old.r], old.A)
        assert torch.equal(one.B[:, : old.r], old.B)
        assert not one.A[old.r :].any()
        assert not one.B[:, old.r :].any()


@settings(deadline=None)
@given(some_updates(), st.sampled_from([one_scaling, one_alpha]))
def test_folding_keeps_each_update(updates: dict[str, Update], fold: object) -> None:
    folded = fold(updates)  # type: ignore[operator]
    shared = "scaling" if fold is one_scaling else "alpha"
    values = [getattr(one, shared) for one in folded.updates.values()]
    assert values == pytest.approx([values[0]] * len(values))
    for path, one in folded.updates.items():
        bound = 2.0**-23 if path in folded.rounded else 1e-14
        old = updates[path]
        largest = old.scaling * (old.B.double().abs() @ old.A.double().abs()).max() + 1e-30
        assert (delta(one) - delta(old)).abs().max() <= bound * largest
    assert bool(folded.rounded) == bool(folded.notes())


@settings(deadline=None)
@given(st.integers(-3, 3), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_powers_of_two_are_exact_and_keep_the_dtype(power: int, dtype: torch.dtype) -> None:
    B = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    found, exact = times(B, 2.0**power)
    assert exact
    assert found.dtype == dtype
    assert torch.equal(found.double(), B.double() * 2.0**power)


def test_a_narrow_dtype_is_widened_before_anything_is_rounded() -> None:
    B = torch.tensor([[1.0078125, -3.0]], dtype=torch.bfloat16)
    found, exact = times(B, 1.5)
    assert (found.dtype, exact) == (torch.float32, True)
    found, exact = times(torch.tensor([[0.1]]), 1.1)
    assert (found.dtype, exact) == (torch.float32, False)
    small = torch.tensor([[2.0**-24]], dtype=torch.float16)  # half of it is no float16 any more
    assert times(small, 0.5)[0].dtype == torch.float32
