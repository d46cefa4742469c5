"""The folded matrix against the sum in float64, over layouts, sizes and dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sidepath.kernels import folding
from sidepath.kernels.folding import fold

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def in_double(W0: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """The slow, obvious reference."""
    return W0.double() + scaling * (B.double() @ A.double())


def bounds(exact: Tensor, W0: Tensor, A: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, ...]:
    """Between which numbers the sum may lie before it is rounded: float32's own error each side.

    A sum of R products has at most (R + 2) roundings of half a unit of what it adds up.
    """
    unit = torch.finfo(A.dtype).eps / 2
    size = W0.double().abs() + abs(scaling) * (B.double().abs() @ A.double().abs())
    error = (A.shape[0] + 3) * unit * size
    return exact - error, exact + error


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_sum_is_accumulated_exactly_and_rounded_once(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    rank, scaling = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([2.0, -0.3]))
    by_columns = data.draw(st.booleans())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    W0 = torch.randn(rows, columns, generator=generator).to(dtype)
    A = torch.randn(rank, columns, generator=generator, dtype=wide)
    B = torch.randn(rows, rank, generator=generator, dtype=wide)
    out = torch.full((rows, columns), torch.nan, dtype=dtype)
    if by_columns:
        W0, out = W0.T.contiguous().T, out.T.contiguous().T
    block, folding._BLOCK = folding._BLOCK, data.draw(st.integers(1, 300))
    try:
        fold(W0, A, B, scaling, out)
    finally:
        folding._BLOCK = block
    low, high = bounds(in_double(W0, A, B, scaling), W0, A, B, scaling)
    assert out.dtype == dtype
    # Rounding keeps the order: what lies between two numbers rounds to between their roundings.
    assert bool(((out >= low.to(dtype)) & (out <= high.to(dtype))).all())


def test_rounding_twice_would_be_seen() -> None:
    """The bounds above are tight: a product rounded to bfloat16 first lies outside of them."""
    generator = torch.Generator().manual_seed(0)
    W0 = torch.randn(40, 40, generator=generator).bfloat16()
    A, B = torch.randn(4, 40, generator=generator), torch.randn(40, 4, generator=generator)
    twice = W0 + (B @ A).bfloat16()
    low, high = bounds(in_double(W0, A, B, 1.0), W0, A, B, 1.0)
    assert not bool(((twice >= low.bfloat16()) & (twice <= high.bfloat16())).all())


class Allocated(TorchDispatchMode):
    """The largest tensor that an operator made in memory of its own."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        given |= {
            t.untyped_storage().data_ptr() for t in (kwargs or {}).values() if isinstance(t, Tensor)
        }
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_of_the_matrixs_size_is_allocated(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folding, "_BLOCK", 2**17)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    W0 = torch.zeros(1024, 512, dtype=dtype)
    A, B, out = torch.zeros(4, 512, dtype=wide), torch.zeros(1024, 4, dtype=wide), W0.clone()
    with Allocated() as seen:
        fold(W0, A, B, 2.0, out)
    assert seen.largest <= folding._BLOCK < W0.numel()
    with Allocated() as control:
        _ = W0.to(wide) + B @ A
    assert control.largest == W0.numel()
