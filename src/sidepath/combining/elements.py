"""Updates put together element by element: TIES and DARE (floor 6).

Each takes the weighted updates `w_i ΔW_i` of one layer as matrices (O, I); what is small is small
within its layer. Both papers speak of the elements of the change of the weights. PEFT's
`add_weighted_adapter` treats A and B apart, whose product is then made of no `ΔW`'s elements, and
elects signs before it weights; with weights 1 the rule here is the papers'.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from sidepath.kernels.hashed import bits, seed_of


def trimmed(update: Tensor, density: float) -> Tensor:
    """The `ceil(density · n)` elements that are largest in magnitude (all that equal the last of
    them, too); the others are 0. TIES (Yadav et al., 2023, section 3.2, step 1).
    """
    left_out = update.numel() - math.ceil(density * update.numel())
    if left_out <= 0:
        return update
    magnitudes = update.abs()
    threshold = magnitudes.flatten().kthvalue(left_out + 1).values
    return update.where(magnitudes >= threshold, 0.0)


def dropped(update: Tensor, density: float, seed: int) -> Tensor:
    """Each element stays with probability `density` and is divided by it, so that the expectation
    is the update. DARE (Yu et al., 2024, equation 4). The draw follows from `seed` alone.
    """
    if density >= 1:
        return update
    # int32 numbers are uniform over 2^32 values: those below the bound are a share `density`.
    bound = round(density * 2**32) - 2**31
    stays = bits(seed, 0, update.numel(), update.device).view(update.shape) < bound
    return (update / density).where(stays, 0.0)


def elected(updates: Sequence[Tensor]) -> Tensor:
    """The mean, element by element, of those updates that are not 0 and have the sign of the sum
    of all. TIES, steps 2 and 3: `γ = sgn(Σ τ_i)`, then the disjoint mean.
    """
    sign = summed(updates).sign()
    agree = [update.sign() == sign for update in updates]
    count = summed([(one & (sign != 0)).to(sign.dtype) for one in agree])
    kept = summed([update.where(one, 0.0) for update, one in zip(updates, agree, strict=True)])
    return kept / count.clamp(min=1.0)


def summed(updates: Sequence[Tensor]) -> Tensor:
    """The plain sum."""
    return functools.reduce(operator.add, updates)


def put_together(
    updates: Sequence[Tensor], kind: str, density: float, words: Sequence[object]
) -> Tensor:
    """The updates as one, by a kind that looks at elements; `words` seed what is dropped.

    One update alone has nobody to agree with: it is given back as it is.
    """
    if len(updates) == 1:
        return updates[0]
    if kind == "ties":
        return elected([trimmed(update, density) for update in updates])
    thinned = [
        dropped(update, density, seed_of("dare", *words, number))
        for number, update in enumerate(updates)
    ]
    return summed(thinned) if kind == "dare" else elected(thinned)


def linear(updates: Sequence[tuple[float, Tensor]]) -> Tensor:
    """`Σ w_i T_i` in float64."""
    return summed([weight * update.to(torch.float64) for weight, update in updates])
