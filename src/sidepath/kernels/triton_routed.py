"""The routed product in Triton, grouped by slot: `y[t] += s[slot t] B[slot t] (A[slot t] x[t])`.

The factors of all adapters lie stacked, each with its own rank. Tokens are sorted by slot on the
host and cut into tiles of one slot each (`tiles.py`). Two kernels follow: *shrink* makes `h = A x`
of a tile, *expand* adds `s B h` to the tile's rows of `y`. Both accumulate in float32. A tile reads
the rows of its own adapter and no others, so the bytes moved are those of the ranks that are there;
tensor cores work in squares of 16, so in registers a rank is filled up with zeros.

Sources: Punica (Chen et al., 2023: grouped products that share a launch, split over the inner
dimension where tokens are few) and S-LoRA (Sheng et al., 2023: ranks of several sizes without
padding). Here split sums lie side by side and are added in order, not with atomics: the same batch
gives the same bits.
A kernel is longer than our functions are elsewhere: half of its lines are Triton's arguments.

Dimensions: N tokens, I in, O out, S sum of ranks, K adapters, T tiles, P parts of the inner
dimension, R greatest rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sidepath.errors import RoutingError
from sidepath.kernels.tiles import Tiles, tiles_of
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
COLUMNS = 64
"""Inner columns of one step of *shrink*."""
OUTPUTS = 128
"""Columns of `y` of one program of *expand*."""
KERNELS = ("_tokens", "_square", "_shrink", "_expand")
"""What `bind` makes Triton's: the two helpers, and the two kernels that call them."""

tl: Any = None
if TYPE_CHECKING:
    constexpr = Any


def supports(y_NO: Tensor, x_NI: Tensor, A_SI: Tensor, B_SO: Tensor) -> bool:
    """Whether the kernels take these dtypes and this device; says nothing of shapes.

    May load Triton.
    """
    one_kind = x_NI.dtype == y_NO.dtype and A_SI.dtype == B_SO.dtype
    known = x_NI.dtype in DTYPES and A_SI.dtype in {x_NI.dtype, torch.float32}
    return one_kind and known and runs_on(x_NI)


def add_routed_(
    y_NO: Tensor,
    x_NI: Tensor,
    A_SI: Tensor,
    B_SO: Tensor,
    starts: tuple[int, ...],
    scalings: tuple[float, ...],
    slot_N: Tensor,
    *,
    tiles: Tiles | None = None,
) -> None:
    """`y[t] += scalings[k] * B_k (A_k x[t])` with `k = slot[t]`, in place on `y`; -1 adds nothing
    and leaves the row as it is to the bit. Records no gradient.

    `A_k` is the rows [starts[k], starts[k + 1]) of `A_SI`, `B_k` those rows of `B_SO`, transposed.
    `x` and `y` are of one dtype (float32, bfloat16 or float16); the factors are too, or float32.
    `tiles`: what `tiles_of` made of the same slots, starts and scalings, to be made only once.

    Precision: float32 over float32 in full; factors of float32 beside inputs of 16 bits in TF32,
    which keeps all bits of `x` and more of the factors than a cast would; else in `x`'s dtype, `h`
    rounded to it once. Sums are kept in float32 and each `y` is rounded once.

    With the factors exchanged this is its own gradient: `dx[t] += s A_k^T (B_k dy[t])` is
    `add_routed_(dx, dy, B_SO, A_SI, ...)`.
    Errors: `RoutingError` with all faults of shape, dtype, device, or a gradient asked for.
    """
    if tiles is None:
        tiles = tiles_of(slot_N, starts, scalings, x_NI.device)
    if not _fits(y_NO, x_NI, A_SI, B_SO, tiles):
        _check(y_NO, x_NI, A_SI, B_SO, tiles)
    if not len(tiles.tiles_T4) or not min(x_NI.shape[1], y_NO.shape[1]):
        return
    bind(globals(), *KERNELS)
    with on(x_NI.device):
        hidden_PNR = _launch_shrink(x_NI, A_SI, tiles)
        _launch_expand(y_NO, hidden_PNR, B_SO, tiles)


def _fits(y_NO: Tensor, x_NI: Tensor, A_SI: Tensor, B_SO: Tensor, tiles: Tiles) -> bool:
    """Whether `_check` would find no fault: what a launch can afford to ask each time."""
    tokens, ranks = len(tiles.order_N), tiles.stacked
    return (
        A_SI.dim() == B_SO.dim() == 2
        and A_SI.shape[0] == B_SO.shape[0] == ranks
        and y_NO.shape == (tokens, B_SO.shape[1])
        and x_NI.shape == (tokens, A_SI.shape[1])
        and supports(y_NO, x_NI, A_SI, B_SO)
        and y_NO.device == x_NI.device == A_SI.device == B_SO.device == tiles.order_N.device
        and not torch.is_grad_enabled()
    )


def _check(y_NO: Tensor, x_NI: Tensor, A_SI: Tensor, B_SO: Tensor, tiles: Tiles) -> None:
    tensors = {"y": y_NO, "x": x_NI, "A": A_SI, "B": B_SO}
    faults = [
        f"{name} has {tensor.dim()} dimensions: expected 2"
        for name, tensor in tensors.items()
        if tensor.dim() != 2
    ]
    if not faults:
        wanted = {
            "y": (len(tiles.order_N), B_SO.shape[1]),
            "x": (len(tiles.order_N), A_SI.shape[1]),
            "A": (tiles.stacked, A_SI.shape[1]),
            "B": (tiles.stacked, B_SO.shape[1]),
        }
        faults += [
            f"{name} is {tuple(tensors[name].shape)}: expected {shape}"
            for name, shape in wanted.items()
            if tuple(tensors[name].shape) != shape
        ]
    if not supports(y_NO, x_NI, A_SI, B_SO):
        found = ", ".join(f"{name} {t.dtype} on {t.device}" for name, t in tensors.items())
        faults.append(f"{found}: expected x and y alike, factors alike or float32, on CUDA")
    if len({tensor.device for tensor in (*tensors.values(), tiles.order_N)}) > 1:
        faults.append("the tensors and tiles are on several devices")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values()):
        faults.append("a gradient would be recorded: this product records none")
    if faults:
        raise RoutingError("a routed product cannot be taken", faults=faults)


def shape_class(y_NO: Tensor, x_NI: Tensor, tiles: Tiles) -> tuple[int, ...]:
    """What one agreement with the plain path vouches for: these widths, at these block sizes."""
    blocks = tiles.block, power_of_two(tiles.rank, 16, 64)
    return (x_NI.shape[1], y_NO.shape[1], *blocks)


def _launch_shrink(x_NI: Tensor, A_SI: Tensor, tiles: Tiles) -> Tensor:
    """`h` in float32, in parts that sum to it, at each token's place in the order."""
    width, count = x_NI.shape[1], len(tiles.tiles_T4)
    block_r = power_of_two(tiles.rank, 16, 64)
    chunks = -(-tiles.rank // block_r)
    parts, steps = split(width, COLUMNS, count * chunks)
    hidden_PNR = torch.empty(
        parts, len(tiles.order_N), tiles.rank, dtype=torch.float32, device=x_NI.device
    )
    _, dot, precision = _precision(x_NI, A_SI)
    kernel: Any = _shrink
    kernel[count, chunks, parts](
        *(x_NI, A_SI, hidden_PNR, tiles.order_N, tiles.tiles_T4),
        *(width, x_NI.stride(0), x_NI.stride(1), A_SI.stride(0), A_SI.stride(1)),
        *(hidden_PNR.stride(0), hidden_PNR.stride(1), steps),
        *(tiles.block, block_r, COLUMNS, dot, precision),
        **ALWAYS,
    )
    return hidden_PNR


def _launch_expand(y_NO: Tensor, hidden_PNR: Tensor, B_SO: Tensor, tiles: Tiles) -> None:
    width, count = y_NO.shape[1], len(tiles.tiles_T4)
    rounded, dot, precision = _precision(y_NO, B_SO)
    kernel: Any = _expand
    kernel[count, -(-width // OUTPUTS)](
        *(y_NO, B_SO, hidden_PNR, tiles.order_N, tiles.tiles_T4, tiles.scalings_T),
        *(width, y_NO.stride(0), y_NO.stride(1), B_SO.stride(0), B_SO.stride(1)),
        *(hidden_PNR.stride(0), hidden_PNR.stride(1), len(hidden_PNR)),
        *(tiles.block, power_of_two(tiles.rank, 16, 32), OUTPUTS, rounded, dot, precision),
        **ALWAYS,
    )


def _precision(values: Tensor, factors: Tensor) -> tuple[Any, Any, str]:
    """The dtype `h` is rounded to, the dtype of the products, and how float32 is multiplied."""
    if factors.dtype == torch.float32:
        exact = language_dtype(torch.float32)
        return exact, exact, "ieee" if values.dtype == torch.float32 else "tf32"
    dtype = factors.dtype
    return language_dtype(dtype), language_dtype(dot_dtype(dtype)), "ieee"


def _tokens(tiles, order, BLOCK_N: constexpr) -> Any:  # type: ignore[no-untyped-def]
    """Of the program's tile: places in the order, the tokens there, which of them are any; the
    first row and the rank of its adapter.
    """
    tile = tiles + tl.program_id(0) * 4
    first, count, row, rank = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    places_N = first + tl.arange(0, BLOCK_N)
    live_N = tl.arange(0, BLOCK_N) < count
    token_N = tl.load(order + places_N, mask=live_N, other=0).to(tl.int64)
    return places_N.to(tl.int64), token_N, live_N, row, rank


def _square(start, row_N, n, column_M, m, live_N, live_M) -> Any:  # type: ignore[no-untyped-def]
    """The numbers at `start + row * n + column * m`, (N, M); zeros where either is not live."""
    at_NM = start + row_N[:, None] * n + column_M[None, :] * m
    return tl.load(at_NM, mask=live_N[:, None] & live_M[None, :], other=0.0)


def _shrink(  # type: ignore[no-untyped-def]
    x,
    A,
    h,
    order,
    tiles,
    width,
    x_n,
    x_i,
    A_s,
    A_i,
    h_p,
    h_n,
    steps,
    BLOCK_N: constexpr,
    BLOCK_R: constexpr,
    BLOCK_I: constexpr,
    DOT: constexpr,
    PRECISION: constexpr,
) -> None:
    """`h[part, place] = A[rows of the tile's adapter] x[token]` over one part of the columns.

    Grid: (tiles, chunks of the rank, parts).
    """
    places_N, token_N, live_N, row, rank = _tokens(tiles, order, BLOCK_N)
    ranks_R = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    part = tl.program_id(2)
    if tl.program_id(1) * BLOCK_R < rank:
        row_R, live_R = (row + ranks_R).to(tl.int64), ranks_R < rank
        sum_NR = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
        for step in range(steps):
            at_I = (part * steps + step) * BLOCK_I + tl.arange(0, BLOCK_I)
            live_I = at_I < width
            x_NI = _square(x, token_N, x_n, at_I, x_i, live_N, live_I)
            A_IR = tl.load(  # not `_square`: with the sum in its order more registers are needed
                A + row_R[None, :] * A_s + at_I[:, None] * A_i,
                mask=live_R[None, :] & live_I[:, None],
                other=0.0,
            )
            sum_NR = tl.dot(x_NI.to(DOT), A_IR.to(DOT), sum_NR, input_precision=PRECISION)
        at_NR = part.to(tl.int64) * h_p + places_N[:, None] * h_n + ranks_R[None, :]
        tl.store(h + at_NR, sum_NR, mask=live_N[:, None] & live_R[None, :])


def _expand(  # type: ignore[no-untyped-def]
    y,
    B,
    h,
    order,
    tiles,
    scalings,
    width,
    y_n,
    y_o,
    B_s,
    B_o,
    h_p,
    h_n,
    parts,
    BLOCK_N: constexpr,
    BLOCK_R: constexpr,
    BLOCK_O: constexpr,
    ROUND: constexpr,
    DOT: constexpr,
    PRECISION: constexpr,
) -> None:
    """`y[token] += scaling * sum over parts of h[part, place] B[rows]`, for one block of columns.

    Grid: (tiles, blocks of columns). Each row of `y` is in one tile, so none is written twice.
    """
    places_N, token_N, live_N, row, rank = _tokens(tiles, order, BLOCK_N)
    scaling = tl.load(scalings + tl.program_id(0))
    at_O = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    live_O = at_O < width
    sum_NO = tl.zeros((BLOCK_N, BLOCK_O), dtype=tl.float32)
    for start in range(0, rank, BLOCK_R):
        ranks_R = start + tl.arange(0, BLOCK_R)
        row_R, live_R = (row + ranks_R).to(tl.int64), ranks_R < rank
        hidden_NR = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
        for part in range(parts):
            hidden_NR += _square(h + part * h_p, places_N, h_n, ranks_R, 1, live_N, live_R)
        B_RO = _square(B, row_R, B_s, at_O, B_o, live_R, live_O)
        rounded_NR = hidden_NR.to(ROUND).to(DOT)
        sum_NO = tl.dot(rounded_NR, B_RO.to(DOT), sum_NO, input_precision=PRECISION)
    old_NO = _square(y, token_N, y_n, at_O, y_o, live_N, live_O).to(tl.float32)
    at_NO = y + token_N[:, None] * y_n + at_O[None, :] * y_o
    new_NO = (old_NO + scaling * sum_NO).to(y.dtype.element_ty)
    tl.store(at_NO, new_NO, mask=live_N[:, None] & live_O[None, :])
