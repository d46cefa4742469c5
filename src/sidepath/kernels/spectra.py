"""The singular values of many low-rank products at once, and how many directions they use.

Dimensions: N products, O rows, I columns, R rank of a product (parts x r), r rank of a part,
K singular values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Thin(NamedTuple):
    """The thin factors of an update `B A`, scaling left out; with n parts, part i is `B_i A_i`."""

    A_RI: Tensor
    """The parts' A, stacked: (n·r, I)."""
    B_Or: Tensor
    """The parts' B, stacked: (sum of part sizes, r)."""
    sizes: tuple[int, ...] = ()
    """Rows of each part; empty means one part that is the whole matrix."""


def effective_rank(sigma_NK: Tensor) -> Tensor:
    """exp(entropy) of p_i = σ_i / Σσ (Roy and Vetterli 2007, "The effective rank"), (..., K) to
    (...): 1 when one direction carries all, K when all carry the same, 0 for zeros.
    """
    total_N1 = sigma_NK.sum(-1, keepdim=True)
    some_N1 = total_N1 > 0
    shares_NK = sigma_NK / total_N1.where(some_N1, torch.ones_like(total_N1))
    entropy_N: Tensor = torch.special.entr(shares_NK).sum(-1)
    return entropy_N.exp() * some_N1.squeeze(-1)


def grams(A_NRI: Tensor, B_NOr: Tensor, sizes: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """`A Aᵀ` and `Bᵀ B` (N, R, R) in float64, where the factors are; with parts, `B` counts as
    their blocks along a diagonal.
    """
    A_NRI, B_NOr = A_NRI.double(), B_NOr.double()
    A_NRR = A_NRI @ A_NRI.mT
    if not sizes:
        return A_NRR, B_NOr.mT @ B_NOr
    B_NRR, r = torch.zeros_like(A_NRR), B_NOr.shape[-1]
    for part, B_NPr in enumerate(B_NOr.split_with_sizes(list(sizes), dim=1)):
        rows = slice(part * r, (part + 1) * r)
        B_NRR[:, rows, rows] = B_NPr.mT @ B_NPr
    return A_NRR, B_NRR


def gram_singular_values(A_NRR: Tensor, B_NRR: Tensor) -> Tensor:
    """The singular values (N, R) of each `B A`, smallest first, from `A Aᵀ` and `Bᵀ B` in float64.

    With `Bᵀ B = V diag(λ) Vᵀ` and `S = diag(√λ) Vᵀ` the squares are the eigenvalues of
    `S (A Aᵀ) Sᵀ`: nothing larger than (R, R) is decomposed. A Gram matrix holds squares, so that a
    value is exact to about 1e-8 of the largest one of its product: enough for an effective rank,
    where a QR decomposition of the factors (`analyse/spectrum.py`) is exact to 1e-15. A product
    with NaN or infinity in it has NaN.
    """
    well_N11 = (A_NRR.isfinite() & B_NRR.isfinite()).all(-1).all(-1)[:, None, None]
    zeros = torch.zeros_like(A_NRR)
    lambda_NR, V_NRR = torch.linalg.eigh(B_NRR.where(well_N11, zeros))
    S_NRR = lambda_NR.clamp_min(0).sqrt()[..., None] * V_NRR.mT
    squares_NR = torch.linalg.eigvalsh(S_NRR @ A_NRR.where(well_N11, zeros) @ S_NRR.mT)
    sigma_NR: Tensor = squares_NR.clamp_min(0).sqrt()
    return sigma_NR.where(well_N11[..., 0], torch.nan)
