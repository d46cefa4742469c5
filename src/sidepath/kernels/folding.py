"""A low-rank update folded into a matrix in one pass over its memory.

Dimensions: O out, I in, R rank, N adapted parts, P rows of all parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sidepath.kernels.lowrank import Part

_BLOCK = 2**22
"""Numbers folded at a time on a CPU: 16 MiB in float32, which the last cache of a server's
processor holds between the parts of the work. Smaller blocks measured slower: 2^17 numbers 1.8
times as slow, since a product of a small block spends more on its start than on its numbers."""


@torch.no_grad()
def fold(W0_OI: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float, out_OI: Tensor) -> None:
    """Write `W0 + scaling * B A` into `out`: accumulated in `A`'s dtype, rounded once to `out`'s.

    `A` and `B` have the dtype that sums are accumulated in. `W0` and `out` may have any layout
    (`out` is written along its own memory); they are one tensor or do not overlap. Nothing else is
    allocated but one block in the accumulation dtype, where that is not `out`'s.
    """
    if out_OI.stride(0) < out_OI.stride(1):  # stored by columns: the same update, seen from there
        W0_OI, out_OI, A_RI, B_OR = W0_OI.T, out_OI.T, B_OR.T, A_RI.T
    rows, columns = out_OI.shape
    step = max(1, _BLOCK // max(1, columns)) if out_OI.device.type == "cpu" else max(1, rows)
    exact = W0_OI.dtype == out_OI.dtype == A_RI.dtype
    scratch = None if exact else A_RI.new_empty(min(step, rows), columns)
    for start in range(0, rows, step):
        own = slice(start, min(start + step, rows))
        if scratch is None:
            torch.addmm(W0_OI[own], B_OR[own], A_RI, alpha=scaling, out=out_OI[own])
            continue
        sums = scratch[: own.stop - start]
        sums.copy_(W0_OI[own])
        sums.addmm_(B_OR[own], A_RI, alpha=scaling)
        out_OI[own].copy_(sums)


@torch.no_grad()
def fold_parts(
    W0_OI: Tensor,
    A_NRI: Tensor,
    B_PR: Tensor,
    scaling: float,
    parts: Sequence[Part],
    out_OI: Tensor,
) -> None:
    """`fold` for each part's rows [start, stop), in order; the rows of no part are copied."""
    rank, done, row = A_NRI.shape[0] // len(parts), 0, 0
    for number, (start, stop) in enumerate(parts):
        if start > done:
            out_OI[done:start].copy_(W0_OI[done:start])
        A_RI = A_NRI[number * rank : (number + 1) * rank]
        B_OR = B_PR[row : row + stop - start]
        fold(W0_OI[start:stop], A_RI, B_OR, scaling, out_OI[start:stop])
        done, row = stop, row + stop - start
    if done < len(out_OI):
        out_OI[done:].copy_(W0_OI[done:])
