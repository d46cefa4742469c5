"""An adapter out of two full checkpoints: the low-rank part of what tuning changed (floor 6)."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sidepath.analyse import Keep, Truncated
from sidepath.combining.checkpoints import Change, Pair
from sidepath.combining.dense import nearest
from sidepath.combining.recipe import Extraction
from sidepath.combining.result import DTYPES
from sidepath.combining.skeletons import described
from sidepath.config import as_dict, field_types
from sidepath.core.views import view_of
from sidepath.errors import StoreError
from sidepath.injection.architecture import modules_of
from sidepath.injection.targets import resolve
from sidepath.kernels.hashed import seed_of
from sidepath.methods.base import Site
from sidepath.methods.lora import LoRA
from sidepath.store.configs import model_without_weights
from sidepath.store.fingerprint import fingerprint
from sidepath.store.folder import refuse_within
from sidepath.store.hub import origin_of
from sidepath.store.peft_format import Slot, base_state, by_place, slots_of
from sidepath.store.peft_writing import write_settings
from sidepath.store.refactored import formed, scaled_already
from sidepath.store.saving import merged_record, publish_adapter

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Extracted:
    """What `extract` published."""

    output: Path
    layers: list[dict[str, Any]]
    """Of each update: name, r, error `‖ΔW - B A‖_F`, norm `‖ΔW‖_F`, relative_error."""
    unchanged: list[str]
    """Targets whose matrices are equal in both checkpoints: they get no update."""
    others: list[dict[str, Any]]
    """Of each other tensor that differs: name, shape, change `‖tuned - base‖_F`, norm of the
    base's, only_in (the one checkpoint that holds it), saved (whole, in the adapter)."""
    unknown: list[str]
    """Stored tensors that the model has no place for."""

    @property
    def error(self) -> float:
        """Over all updates, `sqrt(Σ error²)`."""
        return math.hypot(*(layer["error"] for layer in self.layers))

    @property
    def relative_error(self) -> float:
        """`error` as a share of the norm of the updates."""
        return self.error / math.hypot(*(layer["norm"] for layer in self.layers))

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of `sidepath extract`."""
        values = {**vars(self), "output": str(self.output), "kind": "extract"}
        return {**values, "error": self.error, "relative_error": self.relative_error}


def extract(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    output: str | os.PathLike[str],
    how: Extraction,
    *,
    record: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Extracted:
    """Write `output`: the adapter that takes the model in `base` towards the one in `tuned`.

    In each target `ΔW = W_tuned - W_base` becomes `B A` of the rank that `how` names, by the
    singular value decomposition (randomised for large matrices, see `dense.nearest`). Tensors are
    read one pair at a time; no model is built. What else differs is listed, and with `how.whole`
    saved whole: modules in copies of their own, biases of adapted layers beside their updates. The
    manifest has the fingerprint of `base`. Neither folder is changed; all or nothing.

    Errors: `StoreError` for folders that hold no model, for tensors whose shapes differ, are
    missing or quantised (all of them at once), and where no target differs; `TargetNotFound`,
    `WriteFailed`.
    """
    folders, target = [Path(base), Path(tuned)], Path(output)
    refuse_within(folders, target)
    model = model_without_weights(folders[1], "auto")
    sites = resolve(model, LoRA(targets=how.targets, exclude=how.exclude))
    pair = Pair(model, *folders)
    modules = dict(modules_of(model))
    _refuse_sites(sites, modules, pair)
    updates = _updates(sites, modules, pair, how, progress)
    changes = _changes(pair, sites)
    places = {one.name: _place_of(one, updates, modules) for one in changes if how.whole}
    unchanged = [site.path for site in sites if site.path not in updates]
    config = _config(how, updates, unchanged, places)
    _publish(target, model, config, updates, pair, {**_record(how, folders[1]), **(record or {})})
    others = [{**one.as_dict(), "saved": places.get(one.name) is not None} for one in changes]
    return Extracted(target, _rows(updates), unchanged, others, pair.unknown())


def _changes(pair: Pair, sites: Sequence[Site]) -> list[Change]:
    """What differs beside the targets' matrices."""
    targets = {f"{site.path}.weight" for site in sites}
    compared = (pair.change(name) for name in pair if name not in targets)
    return [change for change in compared if change.change != 0]


def _record(how: Extraction, tuned: Path) -> dict[str, Any]:
    origin = {**origin_of(tuned), "fingerprint": fingerprint(tuned).id}
    values = as_dict(how)
    said = {name: values[name] for name in field_types(Extraction) if values[name]}
    return {"extracted": {**said, "tuned": origin}}


def _publish(
    target: Path,
    model: nn.Module,
    config: LoRA,
    updates: Mapping[str, Truncated],
    pair: Pair,
    told: Mapping[str, Any],
) -> None:
    sites = _sites(config, updates, dict(modules_of(model)))
    tensors = _tensors(model, config, sites, updates, pair)
    manifest = described(pair.base.folder, config, sites, merged_record({}, None, told), model)
    by_path = {site.path: site for site in sites}
    settings = write_settings(model, config, by_path, manifest.base_name, manifest.base_revision)
    publish_adapter(target, tensors, settings, manifest, {})


def _refuse_sites(sites: Sequence[Site], modules: Mapping[str, nn.Module], pair: Pair) -> None:
    faults = []
    for site in sites:
        if site.kind != "dense":
            faults.append(f"{site.path}: {type(modules[site.path]).__name__} holds no matrix")
        elif not pair.in_both(f"{site.path}.weight"):
            faults.append(f"{site.path}.weight: not in both checkpoints")
    if faults:
        raise StoreError(
            "no update can be extracted of these targets",
            faults=faults,
            hint="leave them out with --exclude",
        )


def _updates(
    sites: Sequence[Site],
    modules: Mapping[str, nn.Module],
    pair: Pair,
    how: Extraction,
    progress: Progress | None,
) -> dict[str, Truncated]:
    """The update of each target that differs, one at a time. Errors: `StoreError` if none does."""
    found: dict[str, Truncated] = {}
    for number, site in enumerate(sites, 1):
        view = view_of(modules[site.path])
        compared = pair.difference(f"{site.path}.weight")
        assert view is not None
        assert compared is not None
        matrix = view.as_matrix(compared[0])
        if bool(matrix.any()):
            seed = seed_of("extracted", how.seed, site.path)
            found[site.path] = _in_dtype(nearest(matrix, Keep(how.r, how.energy), seed), matrix)
        if progress is not None:
            progress(number, len(sites), site.path)
    if not found:
        raise StoreError(
            "the checkpoints do not differ in any target",
            where=pair.tuned.folder,
            found=", ".join(how.targets),
        )
    return found


def _in_dtype(found: Truncated, like: Tensor) -> Truncated:
    A_KI, B_OK = found.A_KI.to(like.dtype), found.B_OK.to(like.dtype)
    return Truncated(A_KI, B_OK, found.error, found.norm)


def _place_of(
    change: Change, updates: Mapping[str, Truncated], modules: Mapping[str, nn.Module]
) -> Site | None:
    """Where a changed tensor can be saved whole; None where no adapter can hold it.

    An adapted layer's bias beside its update, all else in a copy of its module, which must not have
    adapted modules inside, nor numbers that are not floating.
    """
    path, _, local = change.name.rpartition(".")
    if change.only_in == "base":
        return None
    if path in updates:
        return Site(path, "bias") if local == "bias" else None
    adapted = any(f"{name}.".startswith(f"{path}.") for name in updates)
    plain = path in modules and all(
        t.is_floating_point() for t in base_state(modules[path]).values()
    )
    return Site(path, "whole", pattern=path) if plain and not adapted else None


def _config(
    how: Extraction,
    updates: Mapping[str, Truncated],
    unchanged: Sequence[str],
    places: Mapping[str, Site | None],
) -> LoRA:
    kinds = {site.path: site.kind for site in places.values() if site is not None}
    whole = [path for path, kind in kinds.items() if kind == "whole"]
    stored = {update.A_KI.dtype for update in updates.values()}
    return LoRA(
        **scaled_already({path: update.r for path, update in updates.items()}),
        targets=how.targets,
        exclude=(*how.exclude, *map(glob.escape, unchanged)),
        bias="lora" if "bias" in kinds.values() else "none",
        train_whole=tuple(p for p in whole if not p.startswith(tuple(f"{o}." for o in whole))),
        dtype=next(name for dtype, name in DTYPES.items() if dtype in stored),
    )


def _sites(
    config: LoRA, updates: Mapping[str, Truncated], modules: Mapping[str, nn.Module]
) -> list[Site]:
    """Every place of the adapter, in the model's order."""
    found = {path: Site(path, "dense", pattern=path) for path in updates}
    found |= {path: Site(path, "whole", pattern=path) for path in config.train_whole}
    return [found[path] for path in modules if path in found]


def _tensors(
    model: nn.Module,
    config: LoRA,
    sites: Sequence[Site],
    updates: Mapping[str, Truncated],
    pair: Pair,
) -> dict[str, Tensor]:
    """The adapter's file by PEFT's keys."""
    slots, faults = slots_of(dict(modules_of(model)), config, sites)
    assert not faults, faults
    empty = {slot.key: torch.empty(slot.shape, device="meta") for slot in slots}
    shapes = by_place(empty, slots)
    pairs = {
        path: formed(one.A_KI, one.B_OK, shapes[path]["A"], shapes[path]["B"])
        for path, one in updates.items()
    }
    return {slot.key: _filling(slot, pairs, pair) for slot in slots}


def _filling(slot: Slot, pairs: Mapping[str, tuple[Tensor, Tensor]], pair: Pair) -> Tensor:
    if slot.path in pairs and slot.local in ("A", "B"):
        return pairs[slot.path][slot.local == "B"]
    tensor = pair.in_tuned(f"{slot.path}.{slot.local}")
    if tensor is None:
        raise StoreError("the tuned checkpoint lacks a tensor", found=f"{slot.path}.{slot.local}")
    return tensor.contiguous()


def _rows(updates: Mapping[str, Truncated]) -> list[dict[str, Any]]:
    return [
        {
            "name": path,
            "r": update.r,
            "error": update.error,
            "norm": update.norm,
            "relative_error": update.error / update.norm,
        }
        for path, update in updates.items()
    ]
