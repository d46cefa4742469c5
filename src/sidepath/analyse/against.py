"""An update against the weight it stands beside (LoRA, section 7.3 and Table 7).

Dimensions: O rows of the weight, I its columns, K directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sidepath.analyse.spectrum import Decomposition, Factors, decompose
from sidepath.analyse.subspace import random_like, shared

TOP_SHARE = 0.1
"""Of W0's directions: its most important ones, as in the paper's Figure 4 of section 7.3."""
INTRUDERS_AMONG = 10
"""Leading directions of the merged weight that are looked at (Shuttleworth et al. 2024)."""
INTRUDER_COSINE = 0.5
"""A direction whose cosine with every direction of W0 is below this is an intruder."""


@dataclass(frozen=True)
class Against:
    """What an update ΔW of rank k does to its weight W. Norms are Frobenius norms."""

    weight_norm: float
    """‖W‖."""
    update_norm: float
    """‖ΔW‖."""
    projected: float
    """‖Uᵀ W Vᵀ‖ with U, V the k left and right singular vectors of ΔW: how much of W lies in
    the directions that the update uses."""
    projected_on_own: float
    """The same with W's own k leading directions: the most that any k could show."""
    projected_on_random: float
    """The same with the singular vectors of a Gaussian matrix."""
    expected_on_random: float
    """Its mean square root: k ‖W‖ / sqrt(O I)."""
    in_top_inputs: float
    """φ of ΔW's input directions with W's leading tenth of them: 1, ΔW repeats what W
    emphasises; near a tenth, it does not ask."""
    intruders: tuple[int, ...]
    """Which of the leading directions of W + ΔW (from 1) have no counterpart in W."""

    @property
    def amplification(self) -> float | None:
        """‖ΔW‖ / ‖Uᵀ W Vᵀ‖: how much stronger those directions became; None where W has nothing
        there.
        """
        return self.update_norm / self.projected if self.projected > 0 else None

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            **vars(self),
            "intruders": list(self.intruders),
            "amplification": self.amplification,
        }


def against(weight_OI: Tensor, factors: Factors, seed: int = 0) -> Against:
    """Hold an update against its weight, in float64. Changes nothing.

    Two singular value decompositions of the whole weight, O(O I min(O, I)), are what it costs.
    Directions that a zero or rank-deficient update does not have are left out.
    """
    W_OI = weight_OI.detach().to("cpu", torch.float64)
    update, control = decompose(factors), decompose(random_like(factors, seed))
    largest = float(update.sigma_K[0]) if len(update.sigma_K) else 0.0
    k = int((update.sigma_K > largest * 1e-12).sum()) if largest > 0 else 0
    update, control = update.first(k), control.first(k)
    own = Decomposition(*torch.linalg.svd(W_OI, full_matrices=False))
    top = max(1, round(TOP_SHARE * len(own.sigma_K)))
    phi = shared(update.V_KI, own.V_KI[:top])
    return Against(
        weight_norm=float(own.sigma_K.norm()),
        update_norm=float(update.sigma_K.norm()),
        projected=projected(W_OI, update),
        projected_on_own=float(own.sigma_K[:k].norm()),
        projected_on_random=projected(W_OI, control),
        expected_on_random=k * float(own.sigma_K.norm()) / math.sqrt(W_OI.numel()),
        in_top_inputs=phi[-1][-1] if phi else 0.0,
        intruders=intruders(W_OI, update, own.U_OK) if k else (),
    )


def projected(weight_OI: Tensor, directions: Decomposition) -> float:
    """‖Uᵀ W Vᵀ‖_F for the directions of another matrix of W's shape."""
    return float((directions.U_OK.T @ weight_OI @ directions.V_KI.T).norm())


def intruders(
    weight_OI: Tensor,
    update: Decomposition,
    own_OK: Tensor,
    among: int = INTRUDERS_AMONG,
    cosine: float = INTRUDER_COSINE,
) -> tuple[int, ...]:
    """Which of the `among` leading left-singular vectors of W + ΔW (numbered from 1) have an
    absolute cosine below `cosine` with every left-singular vector of W, `own_OK`
    (Shuttleworth et al. 2024, "LoRA vs full fine-tuning: an illusion of equivalence").
    """
    merged_OI = weight_OI + (update.U_OK * update.sigma_K) @ update.V_KI
    U_OK = torch.linalg.svd(merged_OI, full_matrices=False).U[:, :among]
    nearest = (own_OK.T @ U_OK).abs().amax(0).tolist()
    return tuple(number for number, value in enumerate(nearest, 1) if value < cosine)
