"""A product with a matrix packed into 4 bits, in Triton: dequantised on the way, never as a whole.

bitsandbytes packs the flattened (O, I) matrix two numbers a byte, the first in the high half, as
codes of 16 levels; each block of 64 numbers has one scale, in float32. With double quantisation
the scales are 8-bit codes themselves, each 256 with a scale of their own, and one offset for all
(Dettmers et al., 2023, section 3). A number is `level * scale`, rounded to the dtype of the
product as the plain path rounds it.

For few rows the product is bound by reading the matrix: here half a byte a number, where the plain
path also writes and reads it once at two bytes or four. For many rows a product of its own is
better; which, `checked.py` measures.

Dimensions: N rows, O out, I in, J = I / 2 bytes of a row, P parts of the dimension summed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sidepath.errors import UnsupportedModule
from sidepath.kernels.triton_load import (
    ALWAYS,
    bind,
    dot_dtype,
    language_dtype,
    on,
    power_of_two,
    runs_on,
    split,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = 32
"""Rows of the matrix in one tile of it."""
BYTES = 32
"""Bytes of each of those rows in one tile: one block of 64 numbers, so one scale where rows begin
where blocks do."""

tl: Any = None
if TYPE_CHECKING:
    constexpr = Any


@dataclass(frozen=True)
class Packed:
    """The tensors that stand for an (O, I) matrix."""

    codes: Tensor
    """uint8, contiguous: O I / 2 bytes."""
    levels: Tensor
    """float32: the 16 levels."""
    scales: Tensor
    """float32, one a block; with double quantisation uint8."""
    shape: tuple[int, int]
    """(O, I)."""
    block: int
    """Numbers under one scale."""
    scale_levels: Tensor | None = None
    """float32: the 256 levels of the scales, with double quantisation."""
    scale_scales: Tensor | None = None
    """float32: one a block of scales."""
    scale_block: int = 1
    """Scales under one scale of their own."""
    offset: Tensor | None = None
    """float32, one number: what was taken off the scales before they were quantised."""


def packed_of(codes: Tensor, state: Any) -> Packed:
    """A weight of bitsandbytes (`weight.data`) and its `quant_state`, without a copy."""
    rows, columns = state.shape
    own = state.state2 if state.nested else None
    return Packed(
        codes,
        state.code,
        state.absmax,
        (rows, columns),
        state.blocksize,
        None if own is None else own.code,
        None if own is None else own.absmax,
        1 if own is None else own.blocksize,
        None if own is None else state.offset,
    )


def supports(x: Tensor, packed: Packed) -> bool:
    """Whether the kernels take this dtype, device and matrix. May load Triton.

    A matrix of an odd width has bytes that belong to two rows: it is left to the plain path.
    """
    even = packed.shape[1] % 2 == 0 and packed.block % 2 == 0
    return even and x.dtype in DTYPES and packed.codes.is_contiguous() and runs_on(x)


def product(x_NI: Tensor, packed: Packed) -> Tensor:
    """`x W^T`, (N, O) in `x`'s dtype (float32, bfloat16, float16), summed in float32.

    Records no gradient (see `gradient`). Errors: `UnsupportedModule` with all faults.
    """
    _check(x_NI, packed, packed.shape[1])
    rows, (width, inner) = len(x_NI), packed.shape
    single = rows == 1
    block_n = power_of_two(rows, 16, 64)
    blocks = -(-width // ROWS)
    parts, steps = split(inner // 2, BYTES, blocks * (-(-rows // block_n)))
    y_PNO = _sums(x_NI, parts, width)
    if not y_PNO.numel():
        return y_PNO.sum(0)
    with on(x_NI.device):
        kernel, tile = (_single, ()) if single else (_forward, (block_n,))
        grid = (blocks, parts) if single else (blocks, parts, -(-rows // block_n))
        kernel[grid](  # type: ignore[index]
            *(x_NI, y_PNO, _tensors(packed), *_sizes(x_NI, packed), *y_PNO.stride()[:2], steps),
            *(*_constants(x_NI, packed), *tile),
            **ALWAYS,
        )
    return _summed(y_PNO, x_NI.dtype)


def gradient(dy_NO: Tensor, packed: Packed) -> Tensor:
    """`dy W`, (N, I) in `dy`'s dtype: the gradient of `product` for its input.

    Errors: `UnsupportedModule` with all faults.
    """
    _check(dy_NO, packed, packed.shape[0])
    rows, (inner, width) = len(dy_NO), packed.shape
    block_n = power_of_two(rows, 16, 64)
    blocks = -(-(width // 2) // BYTES)
    parts, steps = split(inner, ROWS, blocks * (-(-rows // block_n)))
    dx_PNI = _sums(dy_NO, parts, width)
    if not dx_PNI.numel():
        return dx_PNI.sum(0)
    with on(dy_NO.device):
        _backward[blocks, parts, -(-rows // block_n)](  # type: ignore[index]
            *(dy_NO, dx_PNI, _tensors(packed), *_sizes(dy_NO, packed), *dx_PNI.stride()[:2]),
            *(steps, *_constants(dy_NO, packed), block_n),
            **ALWAYS,
        )
    return _summed(dx_PNI, dy_NO.dtype)


def _check(x: Tensor, packed: Packed, width: int) -> None:
    faults = []
    if x.dim() != 2 or x.shape[1] != width:
        faults.append(f"input of shape {tuple(x.shape)}: expected (rows, {width})")
    if packed.codes.dtype != torch.uint8:
        faults.append(f"codes in {packed.codes.dtype}: expected uint8")
    if 2 * packed.codes.numel() != packed.shape[0] * packed.shape[1]:
        faults.append(f"{packed.codes.numel()} bytes for a matrix {packed.shape}")
    if not supports(x, packed):
        faults.append(f"{x.dtype} on {x.device}, matrix {packed.shape}: no kernel for these")
    if x.device != packed.codes.device:
        faults.append(f"input on {x.device}, matrix on {packed.codes.device}")
    if faults:
        raise UnsupportedModule("a product with a 4-bit matrix cannot be taken", faults=faults)
    bind(globals(), "_tile", "_single", "_forward", "_backward")


def _sums(x: Tensor, parts: int, width: int) -> Tensor:
    """Room for the parts of the sum: in float32 where there are several."""
    dtype = x.dtype if parts == 1 else torch.float32
    return torch.empty(parts, len(x), width, dtype=dtype, device=x.device)


def _summed(y_PN: Tensor, dtype: torch.dtype) -> Tensor:
    return y_PN[0] if len(y_PN) == 1 else y_PN.sum(0).to(dtype)


def _tensors(packed: Packed) -> tuple[Tensor, ...]:
    """The matrix's tensors; without double quantisation some stand in that are not read."""
    levels, scales = packed.levels, packed.scales
    if packed.offset is None or packed.scale_levels is None or packed.scale_scales is None:
        return packed.codes, levels, scales, levels, levels, levels
    return packed.codes, levels, scales, packed.scale_levels, packed.scale_scales, packed.offset


def _sizes(x: Tensor, packed: Packed) -> tuple[int, ...]:
    return len(x), *packed.shape, x.stride(0), x.stride(1)


def _constants(x: Tensor, packed: Packed) -> tuple[Any, ...]:
    aligned = packed.shape[1] % packed.block == 0 and packed.block % (2 * BYTES) == 0
    dtypes = language_dtype(x.dtype), language_dtype(dot_dtype(x.dtype))
    nested = packed.offset is not None
    return (packed.block, packed.scale_block, nested, aligned), *dtypes, ROWS, BYTES


def _tile(  # type: ignore[no-untyped-def]
    matrix,
    out,
    width,
    row_O,
    byte_J,
    first,
    PACKING: constexpr,
    ROUND: constexpr,
    DOT: constexpr,
):
    """A tile of the matrix, as its even and its odd columns, each (rows, bytes).

    `first` is the first of the bytes. Outside the matrix the numbers are finite and mean nothing.
    """
    codes, levels, scales, scale_levels, scale_scales, offset = matrix
    BLOCK: constexpr = PACKING[0]
    SCALE_BLOCK: constexpr = PACKING[1]
    NESTED: constexpr = PACKING[2]
    ALIGNED: constexpr = PACKING[3]
    live_OJ = (row_O < out)[:, None] & (byte_J < width // 2)[None, :]
    at_OJ = row_O.to(tl.int64)[:, None] * (width // 2) + byte_J[None, :]
    pair_OJ = tl.load(codes + at_OJ, mask=live_OJ, other=0).to(tl.int32)
    if ALIGNED:
        inside = tl.minimum(first, width // 2 - 1)  # the last step may lie beyond the row
        block = ((row_O.to(tl.int64) * width + 2 * inside) // BLOCK)[:, None]
        live = (row_O < out)[:, None]
    else:
        block = at_OJ * 2 // BLOCK
        live = live_OJ
    scale = tl.load(scales + block, mask=live, other=0)
    if NESTED:
        own = tl.load(scale_scales + block // SCALE_BLOCK, mask=live, other=0.0)
        scale = tl.load(scale_levels + scale.to(tl.int32)) * own + tl.load(offset)
    even_OJ = tl.load(levels + (pair_OJ >> 4)) * scale
    odd_OJ = tl.load(levels + (pair_OJ & 15)) * scale
    return even_OJ.to(ROUND).to(DOT), odd_OJ.to(ROUND).to(DOT)


def _single(  # type: ignore[no-untyped-def]
    x,
    y,
    matrix,
    rows,
    out,
    width,
    x_n,
    x_i,
    y_p,
    y_n,
    steps,
    PACKING: constexpr,
    ROUND: constexpr,
    DOT: constexpr,
    BLOCK_O: constexpr,
    BLOCK_J: constexpr,
):
    """`y[part, 0] = x W^T` for one row, without tensor cores: sums stay apart until the end.

    Grid: (blocks of rows of the matrix, parts of its columns).
    """
    row_O = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    part = tl.program_id(1)
    sum_OJ = tl.zeros((BLOCK_O, BLOCK_J), dtype=tl.float32)
    for step in range(steps):
        first = (part * steps + step) * BLOCK_J
        byte_J = first + tl.arange(0, BLOCK_J)
        even_OJ, odd_OJ = _tile(
            matrix, out, width, row_O, byte_J, first, PACKING, ROUND, tl.float32
        )
        live_J = byte_J < width // 2
        even_J = tl.load(x + 2 * byte_J * x_i, mask=live_J, other=0.0).to(tl.float32)
        odd_J = tl.load(x + (2 * byte_J + 1) * x_i, mask=live_J, other=0.0).to(tl.float32)
        sum_OJ += even_OJ * even_J[None, :] + odd_OJ * odd_J[None, :]
    result_O = tl.sum(sum_OJ, axis=1).to(y.dtype.element_ty)
    tl.store(y + part * y_p + row_O, result_O, mask=row_O < out)


def _forward(  # type: ignore[no-untyped-def]
    x,
    y,
    matrix,
    rows,
    out,
    width,
    x_n,
    x_i,
    y_p,
    y_n,
    steps,
    PACKING: constexpr,
    ROUND: constexpr,
    DOT: constexpr,
    BLOCK_O: constexpr,
    BLOCK_J: constexpr,
    BLOCK_N: constexpr,
):
    """`y[part] = x W^T` for a block of rows.

    Grid: (blocks of rows of the matrix, parts of its columns, blocks of rows of `x`).
    """
    row_O = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    part = tl.program_id(1)
    row_N = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_N = x + row_N.to(tl.int64)[:, None] * x_n
    sum_NO = tl.zeros((BLOCK_N, BLOCK_O), dtype=tl.float32)
    for step in range(steps):
        first = (part * steps + step) * BLOCK_J
        byte_J = first + tl.arange(0, BLOCK_J)
        even_OJ, odd_OJ = _tile(matrix, out, width, row_O, byte_J, first, PACKING, ROUND, DOT)
        live_NJ = (row_N < rows)[:, None] & (byte_J < width // 2)[None, :]
        even_NJ = tl.load(x_N + 2 * byte_J[None, :] * x_i, mask=live_NJ, other=0.0)
        odd_NJ = tl.load(x_N + (2 * byte_J[None, :] + 1) * x_i, mask=live_NJ, other=0.0)
        sum_NO = tl.dot(even_NJ.to(DOT), tl.trans(even_OJ), sum_NO, input_precision="ieee")
        sum_NO = tl.dot(odd_NJ.to(DOT), tl.trans(odd_OJ), sum_NO, input_precision="ieee")
    at_NO = y + part * y_p + row_N.to(tl.int64)[:, None] * y_n + row_O[None, :]
    live_NO = (row_N < rows)[:, None] & (row_O < out)[None, :]
    tl.store(at_NO, sum_NO.to(y.dtype.element_ty), mask=live_NO)


def _backward(  # type: ignore[no-untyped-def]
    dy,
    dx,
    matrix,
    rows,
    out,
    width,
    dy_n,
    dy_o,
    dx_p,
    dx_n,
    steps,
    PACKING: constexpr,
    ROUND: constexpr,
    DOT: constexpr,
    BLOCK_O: constexpr,
    BLOCK_J: constexpr,
    BLOCK_N: constexpr,
):
    """`dx[part] = dy W` for a block of rows.

    Grid: (blocks of bytes of the matrix's rows, parts of its rows, blocks of rows of `dy`).
    """
    first = tl.program_id(0) * BLOCK_J
    byte_J = first + tl.arange(0, BLOCK_J)
    part = tl.program_id(1)
    row_N = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    even_NJ = tl.zeros((BLOCK_N, BLOCK_J), dtype=tl.float32)
    odd_NJ = tl.zeros((BLOCK_N, BLOCK_J), dtype=tl.float32)
    for step in range(steps):
        row_O = (part * steps + step) * BLOCK_O + tl.arange(0, BLOCK_O)
        even_OJ, odd_OJ = _tile(matrix, out, width, row_O, byte_J, first, PACKING, ROUND, DOT)
        dy_NO = tl.load(
            dy + row_N.to(tl.int64)[:, None] * dy_n + row_O[None, :] * dy_o,
            mask=(row_N < rows)[:, None] & (row_O < out)[None, :],
            other=0.0,
        ).to(DOT)
        even_NJ = tl.dot(dy_NO, even_OJ, even_NJ, input_precision="ieee")
        odd_NJ = tl.dot(dy_NO, odd_OJ, odd_NJ, input_precision="ieee")
    at_NJ = dx + part * dx_p + row_N.to(tl.int64)[:, None] * dx_n + 2 * byte_J[None, :]
    live_NJ = (row_N < rows)[:, None] & (byte_J < width // 2)[None, :]
    tl.store(at_NJ, even_NJ.to(dx.dtype.element_ty), mask=live_NJ)
    tl.store(at_NJ + 1, odd_NJ.to(dx.dtype.element_ty), mask=live_NJ)
