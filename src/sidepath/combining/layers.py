"""One layer's update out of several adapters' (floor 6).

Dimensions: O rows of the adapted matrix, I its columns, R all ranks added up.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sidepath.analyse import Factors, Keep, spectrum, truncate
from sidepath.combining.dense import nearest
from sidepath.combining.elements import put_together
from sidepath.combining.recipe import ELEMENTWISE, Combination
from sidepath.core.delta import accumulation_dtype
from sidepath.kernels.hashed import seed_of
from sidepath.methods.lora import MAX_ALPHA

Weighed = Sequence[tuple[float, Factors]]
"""The updates that one layer has in several adapters, each with its weight, none of which is 0."""


@dataclass(frozen=True)
class Layer:
    """An update as it is written: `scaling · B A`."""

    factors: Factors
    error: float
    """How far it is from what was asked for, `‖wanted - scaling · B A‖_F`, but for the rounding
    to the type it is stored in; 0 for a plain sum."""
    norm: float
    """`‖wanted‖_F`."""


def combined(path: str, carriers: Weighed, recipe: Combination) -> Layer:
    """The layer's update by the recipe. Changes nothing.

    A layer that one adapter alone updates has nothing to resolve: whatever the kind, its update is
    taken as it is, times its weight. Where the ranks that are there do not exceed the one asked
    for, a sum is exact and its factors are those of the adapters.
    """
    keep = Keep(recipe.r, recipe.energy)
    if recipe.kind in ELEMENTWISE and len(carriers) > 1:
        matrices = [_matrix(weight, factors) for weight, factors in carriers]
        wanted = put_together(matrices, recipe.kind, recipe.kept, (recipe.seed, path))
        found = nearest(wanted, keep, seed_of("decomposed", recipe.seed, path))
        dtype = wanted.dtype
    else:
        stack = stacked(carriers)
        whole = keep.energy is None and (keep.r is None or stack.r <= keep.r)
        if whole:
            return Layer(stack, 0.0, spectrum(stack).norm)
        found = truncate(stack, keep)
        dtype = _working(carriers)
    kept = Factors(found.A_KI.to(dtype), found.B_OK.to(dtype), 1.0)
    return Layer(kept, found.error, found.norm)


def stacked(carriers: Weighed) -> Factors:
    """`Σ w_i s_i B_i A_i` as one product: the A above one another, the B side by side.

    A factor `|w_i s_i|` that all have in common stays a scaling; else `w_i s_i` is multiplied into
    B, in float64 and rounded once. 16-bit factors stay what they are where that loses nothing, else
    the result is float32.
    """
    dtype = functools.reduce(
        torch.promote_types,
        [tensor.dtype for _, one in carriers for tensor in (one.A_RI, one.B_Or)],
    )
    times = [weight * one.scaling for weight, one in carriers]
    r = sum(one.r for _, one in carriers)
    same = len({abs(factor) for factor in times}) == 1 and abs(times[0]) * r <= MAX_ALPHA
    common = abs(times[0]) if same else 1.0
    exact_OR = torch.cat(
        [
            one.B_Or.to(torch.float64) * (factor / common)
            for factor, (_, one) in zip(times, carriers, strict=True)
        ],
        dim=1,
    )
    if dtype.itemsize < 4 and not torch.equal(exact_OR.to(dtype).to(torch.float64), exact_OR):
        dtype = torch.float32
    A_RI = torch.cat([one.A_RI.to(dtype) for _, one in carriers])
    return Factors(A_RI, exact_OR.to(dtype), common)


def _working(carriers: Weighed) -> torch.dtype:
    """float32, or float64 where an adapter is."""
    dtypes = [accumulation_dtype(one.A_RI.dtype) for _, one in carriers]
    return functools.reduce(torch.promote_types, dtypes)


def _matrix(weight: float, one: Factors) -> Tensor:
    """`w ΔW` (O, I), in float32 or float64."""
    dtype = accumulation_dtype(one.A_RI.dtype)
    return (weight * one.scaling * one.B_Or.to(dtype)) @ one.A_RI.to(dtype)
