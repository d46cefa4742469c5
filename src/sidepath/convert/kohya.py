"""kohya's names, for the text encoders of image pipelines: one safetensors file (floor 5).

Dimensions: R rank, I columns, O rows.

    lora_te_<path, dots as underscores>.lora_down.weight (R, I), .lora_up.weight (O, R), .alpha ()

The update is alpha / R times up times down. Each module has an alpha of its own, in float32, so
that nothing is folded. Underscores do not say where the dots were: the base's names do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sidepath.convert.outside import both_factors, names_of, scaling_from
from sidepath.convert.passport import restored
from sidepath.convert.pipeline_names import (
    COMPONENTS,
    known_paths,
    matched,
    own_tensors,
    spelled,
    spellings,
)
from sidepath.convert.portable import Options, Portable, Update, portable_of, require_sayable
from sidepath.convert.stateful import read_file, write_file
from sidepath.errors import ConfigError, DamagedAdapter
from sidepath.store.peft_config import commonest

_DOWN, _UP, _ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
_ENDINGS = (_DOWN, _UP, _ALPHA)
_MIXED = (
    "modules have alphas of their own: diffusers (seen in 0.42.1) passes over all but the "
    "commonest one for CLIP's text encoders; for diffusers convert with --to diffusers"
)


def is_kohya(keys: list[str]) -> bool:
    """Whether a file's keys are kohya's."""
    return any(key.startswith("lora_") and key.endswith((_DOWN, _UP)) for key in keys)


def write(portable: Portable, path: Path, options: Options) -> list[str]:
    """Write one file; returns notes. Errors: `StoreError` that names all it has no place for."""
    updates = require_sayable(portable, "kohya's format")
    prefix = COMPONENTS[options.component].kohya
    tensors: dict[str, Tensor] = {}
    for name, one in updates.items():
        start = prefix + spelled(name).replace(".", "_")
        tensors |= {start + _DOWN: one.A, start + _UP: one.B, start + _ALPHA: _alpha(one)}
    more = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(commonest(one.r for one in updates.values())),
        "ss_network_alpha": str(commonest(one.alpha for one in updates.values())),
    }
    write_file(tensors, path, portable, more)
    return [_MIXED] if len({one.alpha for one in updates.values()}) > 1 else []


def _alpha(one: Update) -> Tensor:
    return torch.tensor(one.alpha, dtype=torch.float32)


def read(path: Path, options: Options) -> Portable:
    """Read one component of a file; where it is not one of ours, the base tells its names.

    Errors: `DamagedAdapter` with all faults; `ConfigError` without a base; `StoreError`.
    """
    tensors, _, passport = read_file(path)
    own, notes = own_tensors(tensors, COMPONENTS[options.component].kohya, path)
    paths = known_paths(options, passport)
    if paths is None:
        raise ConfigError(
            "underscores do not say where the dots of a module's name were",
            where=path,
            hint="give the text encoder's folder, or its config.json: --base BASE",
        )
    updates, faults = _updates(own)
    if faults:
        raise DamagedAdapter("kohya's weights cannot be read", where=path, faults=faults)
    names = matched(updates, spellings(paths, "_"), path)
    found = {names[name]: one for name, one in updates.items()}
    if passport is not None:
        return replace(restored(passport, found, path), notes=tuple(notes))
    return portable_of(found, options=options, notes=notes)


def _updates(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Update], list[str]]:
    faults = [f"{key}: unexpected" for key in tensors if not key.endswith(_ENDINGS)]
    found = {}
    for name in sorted(names_of(tensors, _ENDINGS)):
        A, B, alpha = (tensors.get(name + ending) for ending in _ENDINGS)
        try:
            A, B = both_factors(A, B, ("lora_down", "lora_up"))
            scaling = 1.0 if alpha is None else scaling_from(alpha, len(A))
            found[name] = Update(A, B, scaling)
        except ValueError as error:
            faults.append(f"{name}: {error}")
    return found, faults
