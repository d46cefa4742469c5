"""Matrices laid out in blocks: the plain product, in both dtypes, for every number of rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidepath.kernels import blocked

DTYPES = [
    dtype
    for dtype in (torch.float32, torch.bfloat16)
    if blocked.lays_out(torch.ones(2, 2, dtype=dtype))
]
pytestmark = pytest.mark.skipif(not DTYPES, reason="no oneDNN of an x86 processor")


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 40), out=st.integers(1, 70), into=st.integers(1, 70), biased=st.booleans()
)
def test_the_product_is_the_plain_one(
    dtype: torch.dtype, rows: int, out: int, into: int, biased: bool
) -> None:
    generator = torch.Generator().manual_seed(rows * 71 + out)
    W, x = (torch.randn(n, into, generator=generator).to(dtype) for n in (out, rows))
    bias = torch.randn(out, generator=generator).to(dtype) if biased else None
    found = blocked.product(x, blocked.lay_out(W), bias)
    expected = x.double() @ W.double().T + (0 if bias is None else bias.double())
    assert found.dtype is dtype
    scale = float(expected.abs().max()) + 1
    assert float((found.double() - expected).abs().max()) <= torch.finfo(dtype).eps * scale * 8


def test_what_cannot_be_laid_out_is_not() -> None:
    assert not blocked.lays_out(torch.ones(2, 2, dtype=torch.float64))
    assert not blocked.lays_out(torch.ones(2))
    assert not blocked.lays_out(torch.ones(2, 2, device="meta"))
