"""The spectrum of a low-rank update, without ever building the update (floor 5).

Dimensions: O rows of the adapted matrix, I its columns, R all ranks stacked (n parts x r),
K singular values.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sidepath.errors import StoreError


@dataclass(frozen=True)
class Factors:
    """One update ΔW = scaling · B A; with n parts, ΔW's part i is scaling · B_i A_i.

    `A_RI` stacks the parts' A (n·r, in). `B_Or` stacks their B, (sum of part sizes, r).
    `sizes` are the rows of each part; empty means one part that is the whole matrix.
    """

    A_RI: Tensor
    B_Or: Tensor
    scaling: float
    sizes: tuple[int, ...] = ()

    @property
    def r(self) -> int:
        """The rank of each part."""
        return self.B_Or.shape[1]


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one update and what follows from them.

    `effective_rank` is exp(entropy) of p_i = σ_i / Σσ (Roy and Vetterli 2007, "The effective
    rank"): 1 when one direction carries all, K when all carry the same, 0 for a zero update.
    `norm` is the Frobenius norm, sqrt(Σ σ²).
    """

    singular_values: tuple[float, ...]
    effective_rank: float
    norm: float

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return dataclasses.asdict(self) | {"singular_values": list(self.singular_values)}


def spectrum(factors: Factors) -> Spectrum:
    """The singular values of ΔW, largest first, in float64 whatever the factors' dtype.

    With B = Q_B R_B (block-diagonal over the parts) and Aᵀ = Q_A R_A, the singular values of
    scaling · B A are those of the small matrix scaling · R_B R_Aᵀ, since Q_B and Q_A have
    orthonormal columns. Cost O((O + I) R²) in place of O(O I min(O, I)); nothing is changed
    in place. There are min(O, I, R) of them at most.
    """
    RB_KR = _triangle_of_B(factors)
    RA_KR = torch.linalg.qr(_float64(factors.A_RI).T, mode="r").R
    sigma_K = torch.linalg.svdvals(RB_KR @ RA_KR.T) * abs(factors.scaling)
    total = float(sigma_K.sum())
    p_K = sigma_K / total if total > 0 else torch.zeros_like(sigma_K)
    effective = float(torch.special.entr(p_K).sum().exp()) if total > 0 else 0.0
    values = tuple(float(value) for value in sigma_K)
    return Spectrum(values, effective, float(sigma_K.square().sum().sqrt()))


def similarity(first: Factors, second: Factors) -> list[list[float]]:
    """φ(i, j) = ‖(U₁ⁱ)ᵀ U₂ʲ‖_F² / min(i, j) of two updates of one layer (LoRA, section 7.2).

    U₁, U₂ are the right-singular vectors of the two A matrices (directions of the input),
    most important first; i and j run from 1 to each one's rank. 1: the smaller space lies in
    the larger one; independent random spaces of R^d give max(i, j) / d. Rows of the result
    are i, columns j. Raises `StoreError` when the two have different inputs.
    """
    if first.A_RI.shape[1] != second.A_RI.shape[1]:
        raise StoreError(
            "two updates of layers with different inputs cannot be compared",
            found=f"{first.A_RI.shape[1]} and {second.A_RI.shape[1]} inputs",
        )
    shared_RS = (_right_vectors(first.A_RI) @ _right_vectors(second.A_RI).T).square()
    summed_RS = shared_RS.cumsum(0).cumsum(1)
    i_R1 = torch.arange(1, summed_RS.shape[0] + 1).unsqueeze(1)
    j_1S = torch.arange(1, summed_RS.shape[1] + 1).unsqueeze(0)
    phi: list[list[float]] = (summed_RS / torch.minimum(i_R1, j_1S)).clamp(0, 1).tolist()
    return phi


def _float64(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _triangle_of_B(factors: Factors) -> Tensor:
    B_Or = _float64(factors.B_Or)
    sizes: Sequence[int] = factors.sizes or (B_Or.shape[0],)
    stops = list(itertools.accumulate(sizes))
    blocks = [
        torch.linalg.qr(B_Or[stop - size : stop], mode="r").R
        for size, stop in zip(sizes, stops, strict=True)
    ]
    triangle_KR: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return triangle_KR


def _right_vectors(A_RI: Tensor) -> Tensor:
    directions_RI: Tensor = torch.linalg.svd(_float64(A_RI), full_matrices=False).Vh
    return directions_RI
