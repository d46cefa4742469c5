"""The thin factors nearest to a matrix that is there in full (floor 6).

Dimensions: O rows, I columns, Q directions of a sketch, K directions kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sidepath.analyse import Decomposition, Keep, Spectrum, Truncated
from sidepath.analyse.truncate import balanced

EXACT = 256
"""Matrices whose smaller side is no larger are decomposed exactly."""
_SPARE = 16
"""Directions of a sketch beyond those that are wanted."""
_POWERS = 4
_FIRST = 48
_ROWS = 1024
_PIECE = 2**20


def nearest(M_OI: Tensor, keep: Keep, seed: int) -> Truncated:
    """The nearest matrix of the rank that `keep` names, as factors; changes nothing.

    Small matrices by their singular value decomposition in float64. Large ones by a randomised
    one (Halko, Martinsson and Tropp, 2011, algorithms 4.4 and 5.1: a Gaussian sketch and 4 power
    iterations), in the matrix's precision: with `energy` the sketch doubles until it holds the
    share of `‖M‖_F²`. The error is that of the factors returned, measured: `‖M - B A‖_F`.
    """
    norm = frobenius(M_OI)
    smaller = min(M_OI.shape)
    if smaller <= EXACT:
        return _cut(M_OI, _exact(M_OI), keep, norm)
    size = _FIRST if keep.r is None else keep.r + max(_SPARE, keep.r // 2)
    while size < smaller // 2:
        found = _sketched(M_OI, size, seed)
        reliable = size - _SPARE
        if keep.energy is None or _holds(found, reliable, keep.energy, norm):
            return _cut(M_OI, found, keep, norm)
        if keep.r is not None and reliable >= keep.r:
            return _cut(M_OI, found, Keep(r=keep.r), norm)
        size *= 2
    return _cut(M_OI, _exact(M_OI), keep, norm)


def frobenius(M: Tensor) -> float:
    """`‖M‖_F`, accumulated in float64."""
    pieces = torch.split(M.flatten(), _PIECE)
    return math.hypot(*(float(piece.double().norm()) for piece in pieces))


def _holds(found: Decomposition, reliable: int, energy: float, norm: float) -> bool:
    held = float(found.sigma_K[:reliable].double().square().sum())
    return held >= energy * norm**2


def _cut(M_OI: Tensor, found: Decomposition, keep: Keep, norm: float) -> Truncated:
    sigmas: list[float] = found.sigma_K.tolist()
    r = keep.r if keep.energy is None else _rank_of(sigmas, keep, norm)
    kept = found.first(max(1, min(r or len(sigmas), len(sigmas))))
    A_KI, B_OK = balanced(kept)
    return Truncated(A_KI, B_OK, _left(M_OI, A_KI, B_OK), norm)


def _rank_of(sigmas: list[float], keep: Keep, norm: float) -> int:
    """`Keep.rank` of a spectrum of which a sketch knows the beginning, and the norm the rest."""
    rest = math.sqrt(max(0.0, norm**2 - math.fsum(sigma**2 for sigma in sigmas)))
    return min(keep.rank(Spectrum((*sigmas, rest))), len(sigmas))


def _left(M_OI: Tensor, A_KI: Tensor, B_OK: Tensor) -> float:
    A_KI, B_OK = A_KI.to(M_OI.dtype), B_OK.to(M_OI.dtype)
    pieces = zip(torch.split(M_OI, _ROWS), torch.split(B_OK, _ROWS), strict=True)
    return math.hypot(*(float((M - B @ A_KI).double().norm()) for M, B in pieces))


def _exact(M_OI: Tensor) -> Decomposition:
    precise = M_OI.to(torch.float64) if min(M_OI.shape) <= EXACT else M_OI
    return Decomposition(*torch.linalg.svd(precise, full_matrices=False))


def _sketched(M_OI: Tensor, size: int, seed: int) -> Decomposition:
    """`M ≈ Q Qᵀ M` with Q (O, size) orthonormal, spanning `(M Mᵀ)^4 M Ω` for a Gaussian Ω."""
    generator = torch.Generator().manual_seed(seed)
    start_IQ = torch.randn(M_OI.shape[1], size, generator=generator, dtype=M_OI.dtype)
    Q_OQ = torch.linalg.qr(M_OI @ start_IQ).Q
    for _ in range(_POWERS):
        Q_IQ = torch.linalg.qr(M_OI.T @ Q_OQ).Q
        Q_OQ = torch.linalg.qr(M_OI @ Q_IQ).Q
    U, sigma_K, V = torch.linalg.svd(Q_OQ.T @ M_OI, full_matrices=False)
    return Decomposition(Q_OQ @ U, sigma_K, V)
