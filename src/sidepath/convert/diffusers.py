"""diffusers' names, for the text encoders of image pipelines: one safetensors file (floor 5).

    text_encoder.<path>.lora_A.weight (R, I), .lora_B.weight (O, R)

Ranks and alphas are PEFT's settings, as JSON in the file's metadata. Files without them, older
spellings (`.lora.down.weight`, `.lora_linear_layer.down.weight`) and `.alpha` tensors are read too;
where no alpha is named it is the rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sidepath.convert.outside import both_factors, names_of, scaling_from
from sidepath.convert.passport import restored
from sidepath.convert.pipeline_names import (
    COMPONENTS,
    OLD,
    known_paths,
    matched,
    own_tensors,
    spelled,
    spellings,
)
from sidepath.convert.portable import (
    Options,
    Portable,
    Update,
    portable_of,
    require_sayable,
)
from sidepath.convert.stateful import read_file, write_file
from sidepath.errors import DamagedAdapter
from sidepath.store.peft_config import PeftSettings, literal, read_settings
from sidepath.store.tensors import file_inside, strict_json

FILE = "pytorch_lora_weights.safetensors"
"""What diffusers calls such a file in a folder."""
_SETTINGS = "lora_adapter_metadata"
_PAIRS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
)
_ALPHA = ".alpha"
_PARTS = ("text_encoder.", "text_encoder_2.", "unet.", "transformer.")
_SAID = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "bias")


def is_diffusers(keys: list[str]) -> bool:
    """Whether a file's keys are diffusers'."""
    ends = tuple(end for pair in _PAIRS for end in pair)
    return any(key.startswith(_PARTS) and key.endswith(ends) for key in keys)


def write(portable: Portable, path: Path, options: Options) -> list[str]:
    """Write one file; returns notes. Errors: `StoreError` that names all it has no place for."""
    updates = require_sayable(portable, "diffusers' format")
    start = f"{COMPONENTS[options.component].diffusers}."
    tensors: dict[str, Tensor] = {}
    for name, one in updates.items():
        keys = (start + spelled(name) + ending for ending in _PAIRS[0])
        tensors |= dict(zip(keys, (one.A, one.B), strict=True))
    settings: dict[str, Any] = {
        name: portable.values[name] for name in _SAID if name in portable.values
    }
    settings["target_modules"] = sorted(updates)
    said = {start + name: value for name, value in settings.items()}
    write_file(tensors, path, portable, {_SETTINGS: json.dumps(said, sort_keys=True)})
    return []


def read(path: Path, options: Options) -> Portable:
    """Read one component of a file. Errors: `DamagedAdapter` with all faults; `StoreError`."""
    path = file_inside(path, FILE) if path.is_dir() else path
    tensors, metadata, passport = read_file(path)
    part = COMPONENTS[options.component].diffusers
    own, notes = own_tensors(tensors, f"{part}.", path)
    settings, faults = _settings(metadata, part)
    updates, more = _updates(own, settings)
    if faults or more:
        raise DamagedAdapter("diffusers' weights cannot be read", where=path, faults=faults + more)
    paths = known_paths(options, passport)
    if paths is not None:
        names = matched(updates, spellings(paths, "."), path)
        updates = {names[name]: one for name, one in updates.items()}
    if passport is not None:
        return replace(restored(passport, updates, path), notes=tuple(notes))
    dropout = settings.dropout if settings else 0.0
    return portable_of(updates, options=options, dropout=dropout, notes=notes)


def _settings(metadata: Mapping[str, str], part: str) -> tuple[PeftSettings | None, list[str]]:
    if _SETTINGS not in metadata:
        return None, []
    try:
        values = strict_json(metadata[_SETTINGS].encode())
        own = {
            key.removeprefix(f"{part}."): value
            for key, value in values.items()
            if key.startswith(f"{part}.")
        }
    except (ValueError, AttributeError) as error:
        return None, [f"{_SETTINGS}: no JSON table: {error}"]
    if not own:
        return None, []
    settings, faults = read_settings({"peft_type": "LORA", **own})
    return settings, [f"{_SETTINGS}: {fault}" for fault in faults]


def _updates(
    tensors: Mapping[str, Tensor], settings: PeftSettings | None
) -> tuple[dict[str, Update], list[str]]:
    left = dict(tensors)
    faults: list[str] = []
    found: dict[str, Update] = {}
    for endings in _PAIRS:
        for name in sorted(names_of(tensors, endings)):
            A, B = (left.pop(name + ending, None) for ending in endings)
            alpha = left.pop(name + _ALPHA, None)
            try:
                if name in found:
                    raise ValueError("comes twice, in two spellings")
                found[name] = _update(name, A, B, alpha, settings)
            except ValueError as error:
                faults.append(f"{name}: {error}")
    return found, faults + [f"{key}: unexpected" for key in left]


def _update(
    name: str,
    A: Tensor | None,
    B: Tensor | None,
    alpha: Tensor | None,
    settings: PeftSettings | None,
) -> Update:
    A, B = both_factors(A, B, ("A", "B"))
    if alpha is not None:
        return Update(A, B, scaling_from(alpha, len(A)))
    if settings is None:
        return Update(A, B, 1.0)
    named = {literal(key)[0] for key in (*settings.ranks, *settings.alphas)}
    path = name if name in named else name.removeprefix(OLD)
    if settings.rank_at(path) != len(A):
        raise ValueError(f"rank {len(A)}, the settings say {settings.rank_at(path)}")
    return Update(A, B, settings.scaling_of(path))
