"""loralib's state dicts, in safetensors files (floor 5).

Dimensions: see `store/loralib_format.py`, which reads the tensors onto a base.

loralib's file has no word for alpha, with which its layers are made: what it has to be is told
when a file is written, and stands in the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from sidepath.convert.outside import scale_from
from sidepath.convert.passport import Passport, manifest_of, paths_of, restored
from sidepath.convert.portable import (
    Options,
    Portable,
    Update,
    portable_of,
    require_sayable,
)
from sidepath.convert.stateful import read_file, write_file
from sidepath.core.views import DenseView, view_of
from sidepath.errors import ConfigError, DamagedAdapter, StoreError
from sidepath.injection.architecture import modules_of
from sidepath.kernels.lowrank import Part
from sidepath.methods.base import Site
from sidepath.methods.lora import LoRA
from sidepath.store.loralib_format import read_state
from sidepath.store.peft_config import BIAS
from sidepath.store.peft_format import (
    BASE_BIAS,
    PAIRS,
    PREFIX,
    gather_parts,
    in_peft_shapes,
    spread_parts,
)
from sidepath.store.tensors import strict_json

_ALPHA = "lora_alpha"
_ENDINGS = (".lora_A", ".lora_B")
_MOST_PARTS = 64
"""Parts of a fused projection, at most: what a file makes us allocate is bounded by its size."""


def is_loralib(keys: list[str]) -> bool:
    """Whether a file's keys are loralib's."""
    return any(key.endswith(_ENDINGS) for key in keys)


def write(portable: Portable, path: Path, options: Options) -> list[str]:
    """Write one file; parts of a fused projection as a MergedLinear's. Returns notes.

    Errors: `StoreError` that names all that loralib has no layer for.
    """
    biases = {key: portable.tensors[key] for key in portable.others() if key.endswith(".bias")}
    kept = {key: tensor for key, tensor in portable.tensors.items() if key not in biases}
    updates = require_sayable(replace(portable, tensors=kept), "loralib", embeddings=True)
    fused = _fused(portable.manifest.sites if portable.manifest else (), updates)
    tensors: dict[str, Tensor] = {}
    for key_path, one in updates.items():
        parts = fused.get(key_path, ())
        B = gather_parts(one.B, parts, one.r // len(parts)) if parts else one.B
        tensors |= {f"{key_path}.lora_A": one.A, f"{key_path}.lora_B": B}
    for key, tensor in biases.items():
        tensors[_bias(key)] = tensor
    alphas = {path: one.alpha / (len(fused.get(path, ())) or 1) for path, one in updates.items()}
    write_file(tensors, path, portable, {_ALPHA: json.dumps(alphas)})
    return _notes(alphas, fused)


def _bias(key: str) -> str:
    """The key in loralib of a bias that PEFT keeps under `key`."""
    name = key.removeprefix(PREFIX)
    return name.removesuffix(BASE_BIAS) + ".bias" if name.endswith(BASE_BIAS) else name


def _notes(alphas: Mapping[str, float], fused: Mapping[str, tuple[Part, ...]]) -> list[str]:
    values = sorted(set(alphas.values()))
    one = f"make every loralib layer with lora_alpha={values[0]:g}"
    notes = (
        [one]
        if len(values) == 1
        else [
            f"make each loralib layer with its own lora_alpha ({len(values)} values); they are in "
            f"the file's metadata, as {_ALPHA}"
        ]
    )
    if fused:
        notes.append(f"{len(fused)} layers are MergedLinear, their parts as in enable_lora")
    return notes


def _fused(sites: Iterable[Site], updates: Mapping[str, Update]) -> dict[str, tuple[Part, ...]]:
    """The parts of fused projections. Errors: `StoreError` where they are not equal ones."""
    fused, faults = {}, []
    for site in sites:
        if not site.parts or site.path not in updates:
            continue
        rows = updates[site.path].B.shape[0]
        size = site.parts[0][1] - site.parts[0][0]
        if rows % size or any(b - a != size or a % size for a, b in site.parts):
            faults.append(f"{site.path}: parts {list(site.parts)} of {rows} rows are not equal")
        fused[site.path] = site.parts
    if faults:
        raise StoreError(
            "loralib's MergedLinear has equal parts; nothing was written", faults=faults
        )
    return fused


def read(path: Path, options: Options) -> Portable:
    """Read a file of ours, or any with loralib's names if the base and alpha are given.

    Errors: `DamagedAdapter` with all faults; `ConfigError` for an alpha that is missing.
    """
    tensors, metadata, passport = read_file(path)
    if passport is not None:
        return _ours(tensors, metadata, passport, path)
    missing = [
        name
        for name, value in (("--base", options.base), ("--alpha", options.alpha))
        if value is None
    ]
    if missing or options.base is None or options.alpha is None:
        raise ConfigError(
            "a file of loralib's does not say what its layers are, nor their lora_alpha",
            where=path,
            expected=" and ".join(missing),
        )
    model = options.base.model
    config, sites, found = read_state(model, tensors, options.alpha, options.fused, path)
    modules = dict(modules_of(model))
    updates: dict[str, Update] = {}
    biases: dict[str, Tensor] = {}
    for site in sites:
        own = found[site.path]
        if site.kind == "dense":
            view = view_of(modules[site.path])
            assert view is not None
            updates[site.path] = _update(config, site.path, own, view, site.parts)
        if "bias" in own:
            ending = BASE_BIAS if site.kind == "dense" else ".bias"
            biases[PREFIX + site.path + ending] = own["bias"]
    made = portable_of(updates, options=options)
    values = {**made.values, "bias": BIAS[config.bias]}
    return replace(made, tensors={**made.tensors, **biases}, values=values)


def _update(
    config: LoRA,
    path: str,
    own: Mapping[str, Tensor],
    view: DenseView,
    parts: tuple[Part, ...],
) -> Update:
    A, B = in_peft_shapes(own["A"], own["B"], view, parts)
    return Update(A, B, config.scaling_of(path), view.kind == "embedding")


def _ours(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], passport: Passport, path: Path
) -> Portable:
    """The file that `write` made, back in PEFT's shapes. Errors: `DamagedAdapter`."""
    left = dict(tensors)
    alphas, faults = _alphas(metadata)
    parts = _parts(passport)
    found: dict[str, Update] = {}
    for name, embedding in paths_of(passport).items():
        A, B = (left.pop(name + ending, None) for ending in _ENDINGS)
        if A is None or B is None or A.dim() != 2 or B.dim() != 2 or name not in alphas:
            faults.append(f"{name}: lora_A, lora_B or its alpha is missing or malformed")
            continue
        scaling = alphas[name] / B.shape[1]
        own = parts.get(name, ())
        rows = passport["tensors"][PREFIX + name + PAIRS[embedding][1]][1][0]
        if not _fit(own, len(B), rows):
            faults.append(f"{name}: lora_B {list(B.shape)} does not fit parts {list(own)}")
        elif own:
            B = spread_parts(B, own, rows)
        found[name] = Update(A, B, scaling, embedding)
    biases = {key: left.pop(short) for key in passport["tensors"] if (short := _bias(key)) in left}
    faults += [f"{key}: unexpected" for key in left]
    if faults:
        raise DamagedAdapter("the loralib weights cannot be read", where=path, faults=faults)
    return restored(passport, found, path, biases)


def _fit(parts: tuple[Part, ...], held: int, rows: int) -> bool:
    """Whether parts of a fused projection with `rows` rows are those that are `held`."""
    at = 0
    for start, stop in parts:
        if not at <= start < stop <= rows:
            return False
        at = stop
    return not parts or (
        sum(stop - start for start, stop in parts) == held and rows <= _MOST_PARTS * held
    )


def _parts(passport: Passport) -> dict[str, tuple[Part, ...]]:
    manifest = manifest_of(passport, [])
    return {} if manifest is None else {site.path: site.parts for site in manifest.sites}


def _alphas(metadata: Mapping[str, str]) -> tuple[dict[str, float], list[str]]:
    try:
        values = strict_json(metadata[_ALPHA].encode())
        return {path: scale_from(value) for path, value in values.items()}, []
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        return {}, [f"metadata {_ALPHA}: {error}"]
