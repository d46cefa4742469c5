"""An update at a lower rank: its leading directions, and exactly what is lost with the others.

Dimensions: O rows of the weight, I its columns, K directions kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from sidepath.analyse.spectrum import Decomposition, Factors, Spectrum, decompose


@dataclass(frozen=True)
class Truncated:
    """An update cut to its K leading directions."""

    A_KI: Tensor
    B_OK: Tensor
    """`B A` is the nearest matrix of rank K to ΔW (Eckart and Young 1936); scaling is 1, and
    both factors carry sqrt(σ)."""
    error: float
    """‖ΔW - B A‖_F = sqrt(Σ of σ² left out), exactly but for rounding."""
    norm: float
    """‖ΔW‖_F."""

    @property
    def r(self) -> int:
        """The rank that is left."""
        return self.A_KI.shape[0]


@dataclass(frozen=True)
class Keep:
    """How much to keep: at most `r` directions, or the fewest that hold a share of the energy."""

    r: int | None = None
    energy: float | None = None

    def rank(self, spectrum: Spectrum) -> int:
        """Directions of this update that are kept; at least 1, so that the layer stays."""
        kept = len(spectrum.singular_values)
        if self.energy is not None:
            kept = min(kept, spectrum.rank_of(self.energy))
        if self.r is not None:
            kept = min(kept, self.r)
        return max(1, kept)


def truncate(factors: Factors, keep: Keep) -> Truncated:
    """Re-compress an update by its singular value decomposition, in float64. Changes nothing.

    Exact when the update's true rank is no more than what is kept.
    """
    whole = decompose(factors)
    sigmas: list[float] = whole.sigma_K.tolist()
    r = keep.rank(Spectrum(tuple(sigmas)))
    A_KI, B_OK = balanced(whole.first(r))
    return Truncated(A_KI, B_OK, math.hypot(*sigmas[r:]), math.hypot(*sigmas))


def balanced(kept: Decomposition) -> tuple[Tensor, Tensor]:
    """A (K, I) and B (O, K) of a decomposition, sqrt(σ) in each."""
    root_K = kept.sigma_K.sqrt()
    return root_K[:, None] * kept.V_KI, kept.U_OK * root_K
