"""The low-rank product and its addition onto a base layer's output, in plain form.

Dimensions: `...` any leading (rows, tokens), I in, O out, R rank, N adapted parts,
P rows of one part of a fused projection.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Part = tuple[int, int]
"""Rows [start, stop) of a fused projection's matrix."""


def low_rank(x_I: Tensor, A_RI: Tensor, B_OR: Tensor) -> Tensor:
    """`B (A x)`, in that order: 2 r (I + O) multiply-adds a row, never the `O x I` product.

    The product runs in the factors' dtype; the result has it too.
    """
    return F.linear(F.linear(x_I.to(A_RI.dtype), A_RI), B_OR)


def add_parts(
    y_O: Tensor, x_I: Tensor, A_NRI: Tensor, B_PR: Tensor, scaling: float, parts: Sequence[Part]
) -> Tensor:
    """`y` with `scaling * B_i (A_i x)` added to the columns [start_i, stop_i) of each part.

    `A_NRI` stacks the parts' `A` as (N R, I); `B_PR` stacks their `B` as (sum of sizes, R).
    Columns of no part are passed through bit for bit. Parts are in ascending order.
    """
    rank = A_NRI.shape[0] // len(parts)
    hidden_NR = F.linear(x_I.to(A_NRI.dtype), A_NRI)
    pieces, column, row = [], 0, 0
    for number, (start, stop) in enumerate(parts):
        pieces.append(y_O[..., column:start])
        hidden_R = hidden_NR[..., number * rank : (number + 1) * rank]
        update_P = F.linear(hidden_R, B_PR[row : row + stop - start])
        pieces.append(y_O[..., start:stop] + (update_P * scaling).to(y_O.dtype))
        column, row = stop, row + stop - start
    pieces.append(y_O[..., column:])
    return torch.cat(pieces, dim=-1)


def product_matrix(A_RI: Tensor, B_OR: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """`scaling * B A` as an (O, I) matrix, accumulated in `dtype`."""
    return (B_OR.to(dtype) @ A_RI.to(dtype)) * scaling


def parts_matrix(
    A_NRI: Tensor,
    B_PR: Tensor,
    scaling: float,
    parts: Sequence[Part],
    rows: int,
    dtype: torch.dtype,
) -> Tensor:
    """The (O, I) update of a fused projection with `rows` rows: zero outside its parts."""
    rank = A_NRI.shape[0] // len(parts)
    update_OI = torch.zeros(rows, A_NRI.shape[1], dtype=dtype, device=A_NRI.device)
    row = 0
    for number, (start, stop) in enumerate(parts):
        A_RI = A_NRI[number * rank : (number + 1) * rank]
        update_OI[start:stop] = product_matrix(A_RI, B_PR[row : row + stop - start], scaling, dtype)
        row += stop - start
    return update_OI
