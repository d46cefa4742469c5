"""Starts of a low-rank delta: random ones, and those that look at the weight it stands beside.

Dimensions: O out, I in, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from sidepath.core.delta import accumulation_dtype

Find = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""From a matrix (O, I) and a rank to factors `A (R, I)` and `B (O, R)` of a part of it."""


def draw_(A_RI: Tensor, start: Literal["kaiming", "gaussian"], r: int) -> None:
    """Fill A from torch's random state. In place, so not while gradients are recorded.

    kaiming: U(-1/sqrt(I), 1/sqrt(I)) (the original code); gaussian: N(0, 1/r²) (the paper names
    no deviation; this is the one in common use).
    """
    if start == "gaussian":
        A_RI.normal_(std=1.0 / r)
    else:
        bound = 1.0 / math.sqrt(A_RI.shape[1])
        A_RI.uniform_(-bound, bound)


def best_factors(M_OI: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """`A (R, I)` and `B (O, R)` whose product `B A` is the rank-r matrix nearest to `M`.

    From the singular value decomposition `M = U S V'` (Eckart and Young): `B = U_r sqrt(S_r)` and
    `A = sqrt(S_r) V_r'`, so that both factors are of one size. Ranks above what `M` has are zeros.
    """
    U, S, V = torch.linalg.svd(M_OI.to(accumulation_dtype(M_OI.dtype)), full_matrices=False)
    kept = min(r, len(S))
    root = S[:kept].sqrt()
    A_RI = M_OI.new_zeros(r, M_OI.shape[1], dtype=S.dtype)
    B_OR = M_OI.new_zeros(M_OI.shape[0], r, dtype=S.dtype)
    A_RI[:kept] = root[:, None] * V[:kept]
    B_OR[:, :kept] = U[:, :kept] * root
    return A_RI, B_OR


def loftq(
    W_OI: Tensor, quantise: Callable[[Tensor], Tensor], r: int, iterations: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """`(A, B, Q)` with `Q + B A` near `W`: LoftQ (Li et al., 2023, algorithm 1).

    Each iteration quantises what the factors leave, `Q = quantise(W - B A)`, and sets the factors
    to the best of what quantising left, `W - Q`. `quantise` gives the dequantised matrix back.
    Where the base is packed already and must not change, `quantise` gives that base's `Q`
    whatever it is asked: then the first iteration is the last that matters.
    """
    A_RI, B_OR = W_OI.new_zeros(r, W_OI.shape[1]), W_OI.new_zeros(W_OI.shape[0], r)
    Q_OI = quantise(W_OI)
    for iteration in range(iterations):
        if iteration:
            Q_OI = quantise(W_OI - B_OR @ A_RI)
        A_RI, B_OR = best_factors(W_OI - Q_OI, r)
    return A_RI, B_OR, Q_OI


def first_factors(M_OI: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """`A (R, I)` and `B (O, R)`: the first r rows of R and columns of Q of `M = Q R`.

    B's columns are orthonormal (OLoRA: Büyükakyüz, 2024, section 3). Ranks above what `M` has are
    zeros.
    """
    Q, R = torch.linalg.qr(M_OI.to(accumulation_dtype(M_OI.dtype)))
    kept = min(r, Q.shape[1])
    A_RI = M_OI.new_zeros(r, M_OI.shape[1], dtype=Q.dtype)
    B_OR = M_OI.new_zeros(M_OI.shape[0], r, dtype=Q.dtype)
    A_RI[:kept], B_OR[:, :kept] = R[:kept], Q[:, :kept]
    return A_RI, B_OR
