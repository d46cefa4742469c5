"""The singular value decomposition of a low-rank update, without ever building the update.

Dimensions: O rows of the adapted matrix, I its columns, R all ranks stacked (n parts x r),
K singular values.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sidepath.kernels.spectra import effective_rank

ENERGIES = (0.9, 0.99)
"""Shares of the energy (the sum of squares) that a number of directions is told for."""


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

    @property
    def shape(self) -> tuple[int, int]:
        """Of ΔW: (O, I)."""
        return self.B_Or.shape[0], self.A_RI.shape[1]


@dataclass(frozen=True)
class Spectrum:
    """The singular values σ of one update, largest first, and what follows from them."""

    singular_values: tuple[float, ...]

    @property
    def norm(self) -> float:
        """The Frobenius norm, sqrt(Σ σ²)."""
        return math.hypot(*self.singular_values)

    @property
    def effective_rank(self) -> float:
        """How many directions carry it: `kernels.spectra.effective_rank`; 0 for a zero update."""
        return float(effective_rank(torch.tensor(self.singular_values, dtype=torch.float64)))

    @property
    def stable_rank(self) -> float:
        """‖ΔW‖_F² / ‖ΔW‖₂² = Σ σ² / σ₁² (Rudelson and Vershynin 2007); 0 for a zero update."""
        first = self.singular_values[0] if self.singular_values else 0.0
        return (self.norm / first) ** 2 if first > 0 else 0.0

    def rank_of(self, energy: float) -> int:
        """The fewest directions whose σ² sum to this share of Σ σ²; 0 for a zero update."""
        wanted = energy * self.norm**2
        sums = itertools.accumulate(value * value for value in self.singular_values)
        short = sum(1 for reached in sums if reached < wanted * (1 - 1e-12))
        return min(short + 1, len(self.singular_values)) if self.norm > 0 else 0

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "singular_values": list(self.singular_values),
            "effective_rank": self.effective_rank,
            "stable_rank": self.stable_rank,
            "rank_at_energy": {str(energy): self.rank_of(energy) for energy in ENERGIES},
            "norm": self.norm,
        }


@dataclass(frozen=True)
class Decomposition:
    """ΔW = U diag(σ) V, in float64: U (O, K) and Vᵀ (I, K) have orthonormal columns."""

    U_OK: Tensor
    sigma_K: Tensor
    V_KI: Tensor

    def first(self, k: int) -> Decomposition:
        """The k largest directions alone: the nearest matrix of rank k (Eckart and Young 1936)."""
        return Decomposition(self.U_OK[:, :k], self.sigma_K[:k], self.V_KI[:k])


def spectrum(factors: Factors) -> Spectrum:
    """The singular values of ΔW in float64, whatever the factors' dtype.

    With B = Q_B R_B (block-diagonal over the parts) and Aᵀ = Q_A R_A, they are those of the
    small matrix scaling · R_B R_Aᵀ, since Q_B and Q_A have orthonormal columns. Cost
    O((O + I) R²) in place of O(O I min(O, I)); nothing is changed in place. There are
    min(O, I, R) of them at most.
    """
    RB_KR = torch.linalg.qr(whole_B(factors), mode="r").R
    RA_KR = torch.linalg.qr(float64(factors.A_RI).T, mode="r").R
    sigma_K = torch.linalg.svdvals(RB_KR @ RA_KR.T) * abs(factors.scaling)
    return Spectrum(tuple(sigma_K.tolist()))


def decompose(factors: Factors) -> Decomposition:
    """`spectrum` with the directions: Q_B U, σ and (Q_A V)ᵀ of the small matrix's own."""
    Q_OK, RB_KR = torch.linalg.qr(whole_B(factors))
    QA_IK, RA_KR = torch.linalg.qr(float64(factors.A_RI).T)
    U, sigma_K, V = torch.linalg.svd(factors.scaling * RB_KR @ RA_KR.T, full_matrices=False)
    return Decomposition(Q_OK @ U, sigma_K, V @ QA_IK.T)


def whole_B(factors: Factors) -> Tensor:
    """B (O, R) in float64: with parts, their blocks along a diagonal."""
    B_Or = float64(factors.B_Or)
    if not factors.sizes:
        return B_Or
    blocks = B_Or.split_with_sizes(list(factors.sizes))
    B_OR: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return B_OR


def float64(tensor: Tensor) -> Tensor:
    """On the CPU, without gradients."""
    return tensor.detach().to("cpu", torch.float64)
