"""How much two updates of one layer point the same way (LoRA, section 7.2 and appendix G).

Dimensions: R ranks of the first, S ranks of the second, D the space that directions lie in.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sidepath.analyse.spectrum import Factors, decompose, float64, whole_B
from sidepath.errors import StoreError

SIDES = {"input": 1, "output": 0}
"""Directions are those of a layer's input (right-singular vectors) or of its output (left)."""


def similarity(first: Factors, second: Factors, side: str = "input") -> list[list[float]]:
    """φ(i, j) = ‖(U₁ⁱ)ᵀ U₂ʲ‖_F² / min(i, j) of two updates of one layer.

    U₁, U₂ are the right-singular vectors of the two A matrices, or of B the left-singular ones
    (`side="output"`), most important first; i and j run from 1 to each one's rank. 1: the smaller
    space lies in the larger one; independent random spaces of R^d give max(i, j) / d. Rows of
    the result are i, columns j. Raises `StoreError` when the two are of different sizes there.
    """
    if first.shape[SIDES[side]] != second.shape[SIDES[side]]:
        raise StoreError(
            f"two updates of layers with different {side}s cannot be compared",
            found=f"{first.shape[SIDES[side]]} and {second.shape[SIDES[side]]} {side}s",
        )
    return shared(_directions(first, side), _directions(second, side))


def of_updates(first: Factors, second: Factors) -> tuple[list[list[float]], list[list[float]]]:
    """`similarity` of the singular vectors of the updates ΔW themselves, not of A or B alone: of
    the inputs, and of the outputs.
    """
    one, other = decompose(first), decompose(second)
    return shared(one.V_KI, other.V_KI), shared(one.U_OK.T, other.U_OK.T)


def grids(first: Factors, second: Factors) -> dict[str, list[list[float]]]:
    """φ of everything two updates of one layer can share, and of two random ones as a control.

    A: `similarity` of the A matrices, the paper's Figures 3 and 4; B: of the B matrices; `inputs`
    and `outputs`: `of_updates`; `random`: as A, of Gaussian factors in the shapes of both. B = 0
    has no directions: where an update is still as it was injected, the three are empty.
    """
    found = {"A": similarity(first, second, "input")}
    if first.B_Or.any() and second.B_Or.any():
        found["B"] = similarity(first, second, "output")
        found["inputs"], found["outputs"] = of_updates(first, second)
    else:
        found |= {"B": [], "inputs": [], "outputs": []}
    found["random"] = similarity(random_like(first, 0), random_like(second, 1), "input")
    return found


def shared(first_RD: Tensor, second_SD: Tensor) -> list[list[float]]:
    """φ(i, j) of the leading i and j rows of two sets of orthonormal rows."""
    summed_RS = (first_RD @ second_SD.T).square().cumsum(0).cumsum(1)
    i_R1 = torch.arange(1, summed_RS.shape[0] + 1).unsqueeze(1)
    j_1S = torch.arange(1, summed_RS.shape[1] + 1).unsqueeze(0)
    phi: list[list[float]] = (summed_RS / torch.minimum(i_R1, j_1S)).clamp(0, 1).tolist()
    return phi


def grassmann_distance(phi: float, i: int, j: int) -> float:
    """D = sqrt(p - Σ σ²) = sqrt(p (1 - φ)), p = min(i, j): the projection distance of two
    subspaces; 0 when the smaller lies in the larger, sqrt(p) when they are orthogonal.

    The paper's appendix G prints φ = (1 - d²) / p; what follows from its own d is φ = 1 - d² / p.
    """
    p = min(i, j)
    return math.sqrt(max(0.0, p * (1 - phi)))


def expected_at_random(i: int, j: int, d: int) -> float:
    """The mean of φ(i, j) over independent random subspaces of R^d: max(i, j) / d."""
    return max(i, j) / d


def random_like(factors: Factors, seed: int = 0) -> Factors:
    """An update of the same shapes with Gaussian factors: the paper's control."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(factors.A_RI.shape, generator=generator, dtype=torch.float64)
    B = torch.randn(factors.B_Or.shape, generator=generator, dtype=torch.float64)
    return Factors(A, B, factors.scaling, factors.sizes)


def _directions(factors: Factors, side: str) -> Tensor:
    """Orthonormal rows: directions of A's rows or of B's columns, most important first."""
    tensor = factors.A_RI if side == "input" else whole_B(factors).T
    found: Tensor = torch.linalg.svd(float64(tensor), full_matrices=False).Vh
    return found
