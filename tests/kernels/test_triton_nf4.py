"""Products with 4-bit matrices in Triton against numbers unpacked one after the other.

On a GPU where there is one, else in Triton's interpreter (`interpreter.py`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sidepath.errors import UnsupportedModule
from sidepath.kernels.triton_nf4 import Packed, gradient, packed_of, product, shape_class, supports
from tests.kernels.interpreter import device, on_triton

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def quantised(
    out: int, width: int, *, double: bool = True, block: int = 64, kind: str = "nf4"
) -> tuple[Tensor, Any]:
    """A random matrix's codes and their state, as bitsandbytes packs it."""
    functional = pytest.importorskip("bitsandbytes").functional
    W_OI = torch.randn(out, width, device=device())
    options = {"blocksize": block, "quant_type": kind, "compress_statistics": double}
    made: tuple[Tensor, Any] = functional.quantize_4bit(W_OI, **options)
    return made


def unpacked(codes: Tensor, state: Any) -> Tensor:
    """The slow, obvious way: (O, I) in float64, one number after the other."""
    flat, levels = codes.reshape(-1).tolist(), state.code.tolist()
    scales = state.absmax.double().tolist()
    if state.nested:
        own, of_scales = state.state2.absmax.tolist(), state.state2.code.tolist()
        size, offset = state.state2.blocksize, float(state.offset)
        scales = [
            of_scales[int(scale)] * own[at // size] + offset for at, scale in enumerate(scales)
        ]
    numbers = []
    for at in range(2 * len(flat)):
        code = flat[at // 2] >> 4 if at % 2 == 0 else flat[at // 2] & 15
        numbers.append(levels[code] * scales[at // state.blocksize])
    return torch.tensor(numbers, dtype=torch.float64, device=codes.device).reshape(state.shape)


def check(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    if expected.numel():
        error, scale = (found.double() - expected).abs().max(), expected.abs().max()
        assert error <= TOLERANCES[found.dtype] * scale, (float(error), float(scale))


def check_both(rows: int, out: int, width: int, dtype: str, seed: int = 0, **packing: Any) -> None:
    """Forward and backward; the numbers rounded to the dtype, as the plain path rounds them."""
    torch.manual_seed(seed)
    codes, state = quantised(out, width, **packing)
    packed = packed_of(codes, state)
    W_OI = unpacked(codes, state).float().to(DTYPES[dtype]).double()
    x = torch.randn(rows, width, device=device()).to(DTYPES[dtype])
    dy = torch.randn(rows, out, device=device()).to(DTYPES[dtype])
    check(product(x, packed), x.double() @ W_OI.T)
    check(gradient(dy, packed), dy.double() @ W_OI)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 70])
@on_triton
def test_rows_that_begin_where_blocks_do(rows: int, double: bool, dtype: str) -> None:
    check_both(rows, 37, 192, dtype, double=double)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("width", [2, 34, 96, 130])
@on_triton
def test_rows_that_begin_inside_a_block(width: int, rows: int) -> None:
    check_both(rows, 9, width, "float32")


@pytest.mark.parametrize("rows", [1, 3])
@on_triton
def test_one_scale_for_a_whole_tile(rows: int) -> None:
    check_both(rows, 5, 1024, "float32", block=512)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 40),
    out=st.integers(1, 40),
    width=st.integers(1, 100).map(lambda half: 2 * half),
    dtype=st.sampled_from(list(DTYPES)),
    double=st.booleans(),
    block=st.sampled_from([64, 128, 512]),
    kind=st.sampled_from(["nf4", "fp4"]),
    seed=st.integers(0, 1000),
)
@on_triton
def test_any_shape(
    rows: int, out: int, width: int, dtype: str, double: bool, block: int, kind: str, seed: int
) -> None:
    check_both(rows, out, width, dtype, seed, double=double, block=block, kind=kind)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("out", "width"), [(3, 2560), (300, 64)])
@on_triton
def test_sums_in_parts(out: int, width: int, rows: int) -> None:
    """Few programs: the dimension that is summed over is cut into parts."""
    check_both(rows, out, width, "bfloat16")


@on_triton
def test_strided_rows() -> None:
    packed = packed_of(*(made := quantised(20, 64)))
    W_OI = unpacked(*made).float().double()
    x = torch.randn(64, 2, 5, device=device())[:, 1].T
    dy = torch.randn(5, 40, device=device())[:, ::2]
    check(product(x, packed), x.double() @ W_OI.T)
    check(gradient(dy, packed), dy.double() @ W_OI)
    check(product(x[:1].expand(3, -1), packed), x[:1].expand(3, -1).double() @ W_OI.T)


@on_triton
def test_what_cannot_be_done_is_said_at_once() -> None:
    packed = packed_of(*quantised(20, 64))
    with pytest.raises(UnsupportedModule) as caught:
        product(torch.zeros(2, 63, device=device(), dtype=torch.float64), packed)
    for part in ("(2, 63): expected (rows, 64)", "float64"):
        assert part in str(caught.value)
    with pytest.raises(UnsupportedModule, match=r"expected \(rows, 20\)"):
        gradient(torch.zeros(2, 64, device=device()), packed)
    short = dataclasses.replace(packed, codes=packed.codes[1:])
    with pytest.raises(UnsupportedModule, match="639 bytes for a matrix"):
        product(torch.zeros(2, 64, device=device()), short)
    odd = packed_of(*quantised(4, 33))
    assert not supports(torch.zeros(2, 33, device=device()), odd)
    with pytest.raises(UnsupportedModule, match="no kernel"):
        product(torch.zeros(2, 33, device=device()), odd)


def test_the_class_of_shapes_counts_rows_roughly() -> None:
    codes = torch.zeros(32, 1, dtype=torch.uint8)
    packed = Packed(codes, torch.zeros(16), torch.zeros(1), (4, 16), 64)
    classes = {rows: shape_class(torch.zeros(rows, 16), packed) for rows in (1, 2, 5, 8)}
    assert classes == {1: (1, 4, 16), 2: (2, 4, 16), 5: (8, 4, 16), 8: (8, 4, 16)}
