"""The kernels of `triton_nf4.py`; how they load is in `triton_load.py`.

Dimensions: N rows, O out, I in, J = I / 2 bytes of a row of the matrix, S scales of a row.
`PACKING` is (numbers under a scale, scales under a scale, whether scales are quantised too, whether
every row, and every tile, begins where a block does).

A kernel is longer than our functions are elsewhere: Triton takes every pointer and size as an
argument of its own, and half of the lines are those.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

tl: Any = None
if TYPE_CHECKING:
    constexpr = Any


def tile(  # type: ignore[no-untyped-def]
    matrix,
    out,
    width,
    row_O,
    byte_J,
    first,
    PACKING: constexpr,
    ROUND: constexpr,
    DOT: constexpr,
    BLOCK_O: constexpr,
    BLOCK_J: constexpr,
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
    if ALIGNED:  # one scale for HALF bytes, loaded once for them all
        HALF: constexpr = BLOCK // 2
        byte_S = first + tl.arange(0, BLOCK_J // HALF) * HALF
        live = (row_O < out)[:, None] & (byte_S < width // 2)[None, :]
        block = (row_O.to(tl.int64)[:, None] * width + 2 * byte_S[None, :]) // BLOCK
    else:
        live = live_OJ
        block = at_OJ * 2 // BLOCK
    scale = tl.load(scales + block, mask=live, other=0)
    if NESTED:
        own = tl.load(scale_scales + block // SCALE_BLOCK, mask=live, other=0.0)
        scale = tl.load(scale_levels + scale.to(tl.int32)) * own + tl.load(offset)
    if ALIGNED:
        scale = tl.broadcast_to(scale[:, :, None], (BLOCK_O, BLOCK_J // HALF, HALF))
        scale = tl.reshape(scale, (BLOCK_O, BLOCK_J))
    even_OJ = tl.load(levels + (pair_OJ >> 4)) * scale
    odd_OJ = tl.load(levels + (pair_OJ & 15)) * scale
    return even_OJ.to(ROUND).to(DOT), odd_OJ.to(ROUND).to(DOT)


def single(  # type: ignore[no-untyped-def]
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
    """`y[part, 0] = x W^T` for one row, without tensor cores: sums stay apart until the end.

    Grid: (blocks of rows of the matrix, parts of its columns).
    """
    row_O = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    part = tl.program_id(1)
    sum_OJ = tl.zeros((BLOCK_O, BLOCK_J), dtype=tl.float32)
    for step in tl.range(steps, loop_unroll_factor=2):
        first = (part * steps + step) * BLOCK_J
        byte_J = first + tl.arange(0, BLOCK_J)
        even_OJ, odd_OJ = tile(
            matrix, out, width, row_O, byte_J, first, PACKING, ROUND, tl.float32, BLOCK_O, BLOCK_J
        )
        live_J = byte_J < width // 2
        even_J = tl.load(x + 2 * byte_J * x_i, mask=live_J, other=0.0).to(tl.float32)
        odd_J = tl.load(x + (2 * byte_J + 1) * x_i, mask=live_J, other=0.0).to(tl.float32)
        sum_OJ += even_OJ * even_J[None, :] + odd_OJ * odd_J[None, :]
    result_O = tl.sum(sum_OJ, axis=1).to(y.dtype.element_ty)
    tl.store(y + part * y_p + row_O, result_O, mask=row_O < out)


def forward(  # type: ignore[no-untyped-def]
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
        even_OJ, odd_OJ = tile(
            matrix, out, width, row_O, byte_J, first, PACKING, ROUND, DOT, BLOCK_O, BLOCK_J
        )
        live_NJ = (row_N < rows)[:, None] & (byte_J < width // 2)[None, :]
        even_NJ = tl.load(x_N + 2 * byte_J[None, :] * x_i, mask=live_NJ, other=0.0)
        odd_NJ = tl.load(x_N + (2 * byte_J[None, :] + 1) * x_i, mask=live_NJ, other=0.0)
        sum_NO = tl.dot(even_NJ.to(DOT), tl.trans(even_OJ), sum_NO, input_precision="ieee")
        sum_NO = tl.dot(odd_NJ.to(DOT), tl.trans(odd_OJ), sum_NO, input_precision="ieee")
    at_NO = y + part * y_p + row_N.to(tl.int64)[:, None] * y_n + row_O[None, :]
    live_NO = (row_N < rows)[:, None] & (row_O < out)[None, :]
    tl.store(at_NO, sum_NO.to(y.dtype.element_ty), mask=live_NO)


def backward(  # type: ignore[no-untyped-def]
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
        even_OJ, odd_OJ = tile(
            matrix, out, width, row_O, byte_J, first, PACKING, ROUND, DOT, BLOCK_O, BLOCK_J
        )
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
