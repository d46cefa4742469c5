"""A product with a matrix packed into 4 bits, in Triton: dequantised on the way, never as a whole.

bitsandbytes packs the flattened (O, I) matrix two numbers a byte, the first in the high half, as
codes of 16 levels; each block of 64 numbers has one scale, in float32. With double quantisation
the scales are 8-bit codes themselves, each 256 with a scale of their own, and one offset for all
(Dettmers et al., 2023, section 3). A number is `level * scale`, rounded to the dtype of the
product as the plain path rounds it.

For few rows the product is bound by reading the matrix: here half a byte a number, where the plain
path also writes and reads it once at two bytes or four. For many rows a product of its own is
better; which, `checked.py` measures.

Dimensions: N rows, O out, I in, P parts of the dimension summed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sidepath.errors import UnsupportedModule
from sidepath.kernels import nf4_kernels
from sidepath.kernels.triton_load import (
    ALWAYS,
    PROGRAMS,
    bind,
    dot_dtype,
    language_dtype,
    on,
    power_of_two,
    runs_on,
    split,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = (32, 64)
"""Rows of the matrix, and bytes of each, in one tile of it."""
SINGLE = (4, 256)
"""The same where `x` has one row: 2 KiB of codes in flight a program, and many programs."""
WANTED = 4 * PROGRAMS
"""Programs worth having at once: what a program reads next waits on what it read, so many hide it.
The kernels are not pipelined by Triton, which would copy each level it looks up to shared memory.
"""


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


def shape_class(x_NI: Tensor, packed: Packed) -> tuple[int, ...]:
    """What one agreement with the plain path vouches for: this matrix's shape, and about so many
    rows (to the next power of two), since which way is faster hangs on them.
    """
    return (power_of_two(len(x_NI), 1, 1 << 30), *packed.shape)


def product(x_NI: Tensor, packed: Packed) -> Tensor:
    """`x W^T`, (N, O) in `x`'s dtype (float32, bfloat16, float16), summed in float32.

    Records no gradient (see `gradient`). Errors: `UnsupportedModule` with all faults.
    """
    _check(x_NI, packed, packed.shape[1])
    rows, (width, inner) = len(x_NI), packed.shape
    single = rows == 1
    tile = SINGLE if single else TILE
    block_n = 1 if single else _block(x_NI)
    grid = -(-width // tile[0]), -(-rows // block_n)
    parts, steps = split(inner // 2, tile[1], grid[0] * grid[1], WANTED)
    y_PNO = _sums(x_NI, parts, width)
    if not y_PNO.numel():
        return _summed(y_PNO, x_NI.dtype)
    with on(x_NI.device):
        kernel: Any = nf4_kernels.single if single else nf4_kernels.forward
        kernel[grid[0], parts, grid[1]](
            *(x_NI, y_PNO, _tensors(packed), *_sizes(x_NI, packed), *y_PNO.stride()[:2], steps),
            *(*_constants(x_NI, packed, tile), block_n),
            **ALWAYS,
            num_stages=1,
        )
    return _summed(y_PNO, x_NI.dtype)


def gradient(dy_NO: Tensor, packed: Packed) -> Tensor:
    """`dy W`, (N, I) in `dy`'s dtype: the gradient of `product` for its input.

    Errors: `UnsupportedModule` with all faults.
    """
    _check(dy_NO, packed, packed.shape[0])
    rows, (inner, width) = len(dy_NO), packed.shape
    block_n = _block(dy_NO)
    grid = -(-width // (2 * TILE[1])), -(-rows // block_n)
    parts, steps = split(inner, TILE[0], grid[0] * grid[1], WANTED)
    dx_PNI = _sums(dy_NO, parts, width)
    if not dx_PNI.numel():
        return _summed(dx_PNI, dy_NO.dtype)
    with on(dy_NO.device):
        kernel: Any = nf4_kernels.backward
        kernel[grid[0], parts, grid[1]](
            *(dy_NO, dx_PNI, _tensors(packed), *_sizes(dy_NO, packed), *dx_PNI.stride()[:2]),
            *(steps, *_constants(dy_NO, packed, TILE), block_n),
            **ALWAYS,
            num_stages=1,
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
    bind(vars(nf4_kernels), "tile", "single", "forward", "backward")


def _block(x: Tensor) -> int:
    """Rows of `x` in a program: float32, without tensor cores, fills registers sooner."""
    return power_of_two(len(x), 16, 32 if x.dtype == torch.float32 else 64)


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


def _constants(x: Tensor, packed: Packed, tile: tuple[int, int]) -> tuple[Any, ...]:
    """How the matrix is packed, the dtypes numbers are rounded to and multiplied in, the tile."""
    begins = packed.shape[1] % packed.block == 0 and tile[1] % (packed.block // 2) == 0
    packing = packed.block, packed.scale_block, packed.offset is not None, begins
    return packing, language_dtype(x.dtype), language_dtype(dot_dtype(x.dtype)), *tile
