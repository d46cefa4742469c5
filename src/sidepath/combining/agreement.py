"""Whether adapters can be combined at all: every reason why not, at once (floor 6)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from sidepath.combining.ingredients import Ingredient, Weights
from sidepath.combining.recipe import Combination
from sidepath.errors import ConfigError, WrongBase, nearest
from sidepath.methods.lora import name_matches
from sidepath.store.fingerprint import fingerprint, same_base
from sidepath.store.manifest import Manifest
from sidepath.store.refactored import keys_at


def weights_of(recipe: Combination, adapters: Sequence[Ingredient]) -> Weights:
    """The weight of each adapter at each module path.

    Errors: `ConfigError` for wrong numbers of weights, patterns that match nothing, and weights
    that leave nothing, all at once.
    """
    count = len(adapters)
    usual = recipe.weights or (1.0,) * count
    paths = list(dict.fromkeys(path for one in adapters for path in one.sites))
    counted = {"weights": usual, **{f'"{key}"': one for key, one in recipe.layer_weights.items()}}
    faults = [
        f"{name}: {len(given)} weights for {count} adapters"
        for name, given in counted.items()
        if len(given) != count
    ]
    for pattern in recipe.layer_weights:
        if not any(name_matches(pattern, path) for path in paths):
            tails = {path.rpartition(".")[2] for path in paths}
            close = nearest(pattern.rpartition(".")[2], tails) or ", ".join(sorted(tails)[:8])
            faults.append(f'"{pattern}" matches none of {len(paths)} layers; there are {close}')
    if faults:
        raise ConfigError("the weights do not fit the adapters", faults=faults)

    def weights(path: str) -> tuple[float, ...]:
        own = [w for key, w in recipe.layer_weights.items() if name_matches(key, path)]
        return own[-1] if own else usual

    used = (
        weight and path in one.factors
        for path in paths
        for weight, one in zip(weights(path), adapters, strict=True)
    )
    if not any(used):
        raise ConfigError("the weights leave no update: each is 0")
    return weights


def require_one_base(
    adapters: Sequence[Ingredient], base: Path | None, allow_other: bool
) -> list[str]:
    """Raise `WrongBase` where adapters were made for different bases; each is named.

    Held against `base` where that is given, else against the first that has a fingerprint; but not
    when `allow_other`. Returns what could not be verified, as lines for people.
    """
    known = [(one, one.manifest) for one in adapters if one.manifest is not None]
    notes = [
        f"{one.folder}: no sidepath.json: its base could not be verified"
        for one in adapters
        if one.manifest is None
    ]
    if allow_other:
        return notes
    faults: list[str] = []
    if base is not None:
        found = fingerprint(base)
        for one, manifest in known:
            faults += [f"{one.name}: {fault}" for fault in same_base(manifest.base, found)]
    for other, theirs in known[1:]:
        one, manifest = known[0]
        differing = _differing(one, manifest, other, theirs)
        faults += [f"{other.name}, held against {one.name}: {fault}" for fault in differing]
    if faults:
        raise WrongBase(
            "the adapters were not made for one base",
            faults=faults,
            hint="combine adapters of one base; --allow-other-base (allow_other_base=True) adds "
            "up their updates all the same",
        )
    return notes


def _differing(
    one: Ingredient, manifest: Manifest, other: Ingredient, theirs: Manifest
) -> list[str]:
    """Why two manifests are not of one base; what either trains whole is not looked at."""
    outside = [*one.whole, *other.whole]
    first, second = (each.base.without(outside) for each in (manifest, theirs))
    return same_base(first, second) or same_base(second, first)


def faults_of(adapters: Sequence[Ingredient]) -> list[str]:
    """Why these adapters make no sense together: classes, labels, kinds of places, shapes, DoRA."""
    faults = [
        f"{one.name}: DoRA's update is no sum: it scales each row by a norm that depends on the "
        "base and on the update (such an adapter is combined alone, at weight 1, uncut)"
        for one in adapters
        if one.dora
    ]
    faults += [
        f"{one.name}: rows of tokens stand in the place of the base's, and are no update to be "
        "added (such an adapter is combined alone, at weight 1, uncut)"
        for one in adapters
        if one.token_rows
    ]
    known = [(one, one.manifest) for one in adapters if one.manifest is not None]
    for (one, first), (other, second) in pairwise(known):
        if first.model_class != second.model_class:
            faults.append(
                f"{other.name} is of a {second.model_class}, {one.name} of a {first.model_class}"
            )
        elif first.labels != second.labels:
            faults.append(f"{other.name} and {one.name} have other labels, or another order")
    for path in dict.fromkeys(path for one in adapters for path in one.sites):
        faults += _faults_at(path, [one for one in adapters if path in one.sites])
    return faults


def _faults_at(path: str, carriers: Sequence[Ingredient]) -> Iterator[str]:
    first = carriers[0]
    for other in carriers[1:]:
        kinds = [one.sites[path].kind == "whole" for one in (first, other)]
        if kinds[0] != kinds[1]:
            whole = first if kinds[0] else other
            yield f"{path}: trained whole in {whole.name}, and not in the other adapter"
            continue
        ours, theirs = (_shapes(one, path) for one in (first, other))
        for name in ours:
            if name in theirs and ours[name] != theirs[name]:
                yield (
                    f"{path}: {name} is {ours[name]} in {first.name}, {theirs[name]} in "
                    f"{other.name}"
                )


def _shapes(one: Ingredient, path: str) -> dict[str, list[int]]:
    """What has to be of one size in all adapters: the update, its form on disk, other tensors."""
    found = {
        local: list(tensor.shape) for (owner, local), tensor in one.others.items() if owner == path
    }
    keys = keys_at(path, one.tensors)
    if keys is not None and path in one.factors:
        found["the update"] = list(one.factors[path].shape)
        found["A without its rank"] = list(one.tensors[keys[0]].shape[1:])
    return found


def is_itself(
    adapters: Sequence[Ingredient], weights: Weights, recipe: Combination, base: Path | None
) -> bool:
    """Whether the combination is one adapter as it is: alone, at weight 1, no rank cut.

    A plain folder of PEFT's whose `base` is given is written anew, exactly: it gets a manifest.
    """
    (only, *more) = adapters
    if more or recipe.energy is not None:
        return False
    if base is not None and only.manifest is None and not only.dora:
        return False
    ranks = [one.A_RI.shape[0] for one in only.factors.values()]
    uncut = recipe.r is None or max(ranks) <= recipe.r
    return uncut and all(weights(path) == (1.0,) for path in only.sites)
