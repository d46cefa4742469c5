"""Biases and modules trained whole, combined (floor 6).

An adapter holds them in full, not as differences: `T_i = T_0 + d_i`. The sum `T_0 + Σ w_i d_i` is
`Σ w_i T_i + (1 - Σ w_i) T_0`: without the base it is known where the weights sum to 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from sidepath.combining.elements import linear, put_together, summed
from sidepath.combining.ingredients import Ingredient, Place, Weights
from sidepath.combining.recipe import ELEMENTWISE, Combination
from sidepath.store.stored import Checkpoint
from sidepath.store.tensors import FLOATING

Held = Sequence[tuple[float, Tensor]]


def combined_others(
    adapters: Sequence[Ingredient],
    weights: Weights,
    recipe: Combination,
    stored: Checkpoint | None,
) -> tuple[dict[Place, Tensor], list[str]]:
    """Each such tensor by its place, and the faults of those that cannot be had.

    `stored` is the base, where it was given. One at weight 0 is the base's own: it is left out.
    """
    found: dict[Place, Tensor] = {}
    faults = []
    for place in dict.fromkeys(place for one in adapters for place in one.others):
        held = [
            (weight, one.others[place])
            for weight, one in zip(weights(place[0]), adapters, strict=True)
            if weight and place in one.others
        ]
        if not held:
            continue
        try:
            found[place] = _combined(place, held, recipe, stored)
        except ValueError as error:
            faults.append(f"{'.'.join(place)}: {error}")
    return found, faults


def _combined(place: Place, held: Held, recipe: Combination, stored: Checkpoint | None) -> Tensor:
    """Errors: `ValueError` where the base's tensor is needed and not there."""
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for _, tensor in held])
    several = recipe.kind in ELEMENTWISE and len(held) > 1
    total = math.fsum(weight for weight, _ in held)
    if math.isclose(total, 1.0, abs_tol=1e-12) and not several:
        return held[0][1] if len(held) == 1 else linear(held).to(dtype)
    own = base_tensor(place, stored)
    if own is None:
        why = f"{recipe.kind} compares changes" if several else f"its weights sum to {total:g}"
        there = "the base holds no such tensor" if stored else "give the base (--base)"
        raise ValueError(f"{why}, and the adapters hold it in full: {there}")
    changes = [weight * (tensor.to(torch.float64) - own) for weight, tensor in held]
    if not several:
        return (own + summed(changes)).to(dtype)
    words = (recipe.seed, *place)
    return (own + put_together(changes, recipe.kind, recipe.kept, words)).to(dtype)


def base_tensor(place: Place, stored: Checkpoint | None) -> Tensor | None:
    """A tensor of the base in float64; None where it is not at hand."""
    name = None if stored is None else stored.found(".".join(place))
    if stored is None or name is None or not stored.floating(name):
        return None
    return stored.read(name).to(torch.float64)


def biases_of_base(
    paths: Iterable[str],
    adapters: Sequence[Ingredient],
    stored: Checkpoint | None,
) -> tuple[dict[Place, Tensor], list[str]]:
    """The base's own bias at each of these modules that has one, and what is not at hand.

    An adapter that trains biases holds one at each module it adapts, also at those whose update
    comes from an adapter that trains none.
    """
    known = dict(_biases(adapters))
    found: dict[Place, Tensor] = {}
    faults = []
    for path in paths:
        own = base_tensor((path, "bias"), stored)
        if own is not None:
            found[path, "bias"] = own.to(known.get(path, torch.float32))
        elif path in known:
            faults.append(
                f"{path}.bias: one adapter trains biases, and the one that adapts this layer does "
                "not: it is the base's own, give the base (--base)"
            )
    return found, faults


def _biases(adapters: Sequence[Ingredient]) -> Iterator[tuple[str, torch.dtype]]:
    """The modules that have a bias, as the bases' fingerprints tell, and its type."""
    for one in adapters:
        for name, sample in one.manifest.base.samples.items() if one.manifest else ():
            path, _, local = name.rpartition(".")
            if local == "bias":
                yield path, FLOATING[sample.dtype]
