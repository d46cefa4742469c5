"""Several adapters as one: a weighted sum of their updates, or TIES, or DARE (floor 6)."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sidepath.analyse import spectrum
from sidepath.combining.agreement import faults_of, is_itself, require_one_base, weights_of
from sidepath.combining.ingredients import Ingredient, Weights, read_all
from sidepath.combining.layers import Layer, combined
from sidepath.combining.others import biases_of_base, combined_others
from sidepath.combining.recipe import Combination
from sidepath.combining.result import Result, biases_missing
from sidepath.config import as_dict, field_types
from sidepath.errors import StoreError
from sidepath.store.folder import refuse_within
from sidepath.store.saving import merged_record, publish_adapter, saved_beside
from sidepath.store.stored import Checkpoint

Folder = str | os.PathLike[str]


@dataclass(frozen=True)
class Combined:
    """What `combine` published."""

    output: Path
    kind: str
    adapters: list[dict[str, Any]]
    """Of each adapter: name, digest of its weights' file, weight."""
    layers: list[dict[str, Any]]
    """Of each layer: name, r, error and norm, `‖wanted - kept‖_F` and `‖wanted‖_F`."""
    notes: list[str]
    """What could not be verified."""

    @property
    def error(self) -> float:
        """Over all layers, `sqrt(Σ error²)`."""
        return math.hypot(*(layer["error"] for layer in self.layers))

    @property
    def relative_error(self) -> float:
        """`error` as a share of the norm of what was asked for."""
        norm = math.hypot(*(layer["norm"] for layer in self.layers))
        return self.error / norm if norm > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of `sidepath combine`."""
        values = {**vars(self), "output": str(self.output)}
        return {**values, "error": self.error, "relative_error": self.relative_error}


def combine(
    adapters: Sequence[Folder],
    output: Folder,
    recipe: Combination | None = None,
    *,
    base: Folder | None = None,
    allow_other_base: bool = False,
    record: Mapping[str, Any] | None = None,
) -> Combined:
    """Write `output`: one adapter, `ΔW = Σ w_i ΔW_i` in each layer, or what the recipe says.

    `adapters`: folders of low-rank adapters of one base, ours or PEFT's; no base is built. Updates
    count as `w_i s_i B_i A_i`, whatever their alpha, rank or scaling; a layer that only one of them
    has stays. `concatenate` is exact but for one rounding of B (none where the scalings agree);
    every other kind tells its error a layer. One adapter at weight 1, uncut, is itself to the bit.

    Biases and modules trained whole need `base`, its folder, unless their weights sum to 1; only
    they are read from it. DoRA's updates have no sum: such an adapter is combined alone and uncut.
    The folder has a manifest with the parents' names, digests and weights (and `record`), unless
    all adapters are plain folders of PEFT's and there is no `base`.

    Errors: `WrongBase` for different bases (`allow_other_base` combines all the same),
    `StoreError` with all reasons why the adapters do not go together, `ConfigError` for weights
    that do not fit, `DamagedAdapter`, `WriteFailed`. All or nothing.
    """
    recipe = recipe or Combination()
    folders, target = [Path(folder) for folder in adapters], Path(output)
    refuse_within(folders, target)
    found = read_all(folders)
    weights = weights_of(recipe, found)
    origin = None if base is None else Path(base)
    notes = require_one_base(found, origin, allow_other_base)
    parents = _parents(found, recipe)
    told = {"combined": {**_said(recipe), "adapters": parents}, **(record or {})}
    if is_itself(found, weights, recipe, origin):
        layers = _copied(found[0], target, told)
    else:
        layers = _published(_result(found, weights, recipe, origin), target, origin, told)
    return Combined(target, recipe.kind, parents, layers, notes)


def _result(
    adapters: Sequence[Ingredient], weights: Weights, recipe: Combination, base: Path | None
) -> Result:
    """Everything combined. Errors: one `StoreError` with all faults."""
    stored = None if base is None else Checkpoint(base)
    faults = faults_of(adapters)
    others: dict[tuple[str, str], Tensor] = {}
    if not faults:  # sizes agree
        others, faults = combined_others(adapters, weights, recipe, stored)
    copies = [key for one in adapters for key in one.copies if _changed(key, adapters)]
    faults += [
        f"{key}: the base's, and not the same in all adapters" for key in dict.fromkeys(copies)
    ]
    if not faults:
        layers = _layers(adapters, weights, recipe)
        result = Result(adapters, layers, others)
        if result.bias == "none":
            return result
        more, faults = biases_of_base(biases_missing(layers, others), adapters, stored)
        result = dataclasses.replace(result, others=others | more)
    if faults:
        raise StoreError("the adapters cannot be combined", faults=faults)
    return result


def _changed(key: str, adapters: Sequence[Ingredient]) -> bool:
    held = [one.copies[key] for one in adapters if key in one.copies]
    return any(other.shape != held[0].shape or bool((other != held[0]).any()) for other in held)


def _layers(
    adapters: Sequence[Ingredient], weights: Weights, recipe: Combination
) -> dict[str, Layer]:
    layers: dict[str, Layer] = {}
    for path in dict.fromkeys(path for one in adapters for path in one.sites):
        carriers = [
            (weight, one.factors[path])
            for weight, one in zip(weights(path), adapters, strict=True)
            if weight and path in one.factors
        ]
        if carriers:
            layers[path] = combined(path, carriers, recipe)
    return layers


def _parents(adapters: Sequence[Ingredient], recipe: Combination) -> list[dict[str, Any]]:
    weights = recipe.weights or (1.0,) * len(adapters)
    return [
        {"name": one.name, "digest": one.digest, "weight": weight}
        for one, weight in zip(adapters, weights, strict=True)
    ]


def _said(recipe: Combination) -> dict[str, Any]:
    """The recipe as a record holds it: what says nothing is left out."""
    values = as_dict(recipe)
    return {name: values[name] for name in field_types(Combination) if values[name]}


def _published(
    result: Result, target: Path, base: Path | None, told: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Write what was combined; returns its layers."""
    tensors = result.tensors()
    manifest = result.manifest(base, merged_record({}, None, told))
    publish_adapter(target, tensors, result.settings(tensors), manifest, {})
    return [
        {"name": path, "r": layer.factors.r, "error": layer.error, "norm": layer.norm}
        for path, layer in result.layers.items()
    ]


def _copied(one: Ingredient, target: Path, told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Write one adapter as it is, with its files and record; returns its layers."""
    manifest = one.manifest
    files = saved_beside(one.folder, manifest)
    if manifest is not None:
        record = merged_record(manifest.record, None, told)
        manifest = dataclasses.replace(manifest, record=record)
    publish_adapter(target, one.tensors, one.settings, manifest, files)
    return [
        {"name": path, "r": factors.r, "error": 0.0, "norm": spectrum(factors).norm}
        for path in one.sites
        if (factors := one.factors.get(path)) is not None
    ]
