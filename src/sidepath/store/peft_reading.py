"""A folder of PEFT's as a method of ours: its settings, where its tensors go, and the LoRA they
make (floor 4).
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from sidepath.core.views import view_of
from sidepath.errors import DamagedAdapter
from sidepath.methods.base import Dtype, Site
from sidepath.methods.lora import LoRA, name_matches
from sidepath.store.peft_config import PeftSettings, commonest, read_settings
from sidepath.store.peft_format import (
    CONFIG,
    ENDINGS,
    FACTORS_A,
    LEFT_BY_PEFT,
    PREFIX,
    TOKENS,
    WEIGHTS,
    groups_of,
)
from sidepath.store.peft_tokens import sites_at
from sidepath.store.tensors import TensorInfo, file_inside, read_json

T = TypeVar("T", int, float)
_DTYPES: Mapping[str, Dtype] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_COPY_OF_EMBEDDING = (".base_layer.weight", ".weight")


def settings_at(folder: Path) -> tuple[dict[str, Any], PeftSettings, list[str]]:
    """A folder's `adapter_config.json` as it stands, what it says, and all of its faults.

    Errors: `DamagedAdapter` where there is none; any `OSError`.
    """
    try:
        values = read_json(file_inside(folder, CONFIG))
    except ValueError as error:
        return {}, PeftSettings(), [f"{CONFIG}: not JSON: {error}"]
    settings, faults = read_settings(values)
    return values, settings, [f"{CONFIG}: {fault}" for fault in faults]


def trusted_settings(folder: Path) -> tuple[dict[str, Any], PeftSettings]:
    """`settings_at` of a folder without faults. Errors: one `DamagedAdapter` with all of them."""
    values, settings, faults = settings_at(folder)
    if faults:
        raise DamagedAdapter("the adapter's settings have faults", where=folder, faults=faults)
    return values, settings


def other_ranks(settings: PeftSettings, header: Mapping[str, TensorInfo]) -> list[str]:
    """The faults of a file whose factors have other ranks than the settings say.

    The scale of an update follows from the settings' rank: it would be wrong in silence.
    """
    faults = []
    for key, info in header.items():
        ending = next((ending for ending in FACTORS_A if key.endswith(ending)), None)
        if ending is None or not info.shape:
            continue
        path = key.removesuffix(ending).removeprefix(PREFIX)
        if info.shape[0] != settings.rank_at(path):
            faults.append(f"{path}: rank {info.shape[0]}, {CONFIG} says {settings.rank_at(path)}")
    return faults


def sites_of(
    modules: Mapping[str, nn.Module], settings: PeftSettings, header: Mapping[str, TensorInfo]
) -> tuple[list[Site], dict[str, str], set[str]]:
    """Where a PEFT file's tensors go, read off their names.

    Returns the sites in the model's order; the keys that repeat a parameter of the base, with that
    parameter's name (PEFT saves adapted embeddings so); and the keys that say nothing.
    """
    names = [key.removeprefix(PREFIX) for key in header if key.startswith(PREFIX)]
    whole = [
        path
        for path in modules
        if path.endswith(settings.modules_to_save) and any(n.startswith(f"{path}.") for n in names)
    ]
    whole = [path for path in whole if not path.startswith(tuple(f"{other}." for other in whole))]
    sites = {path: Site(path, "whole", pattern=path) for path in whole}
    copies, ignored = {}, set()
    for name in names:
        root = next((path for path in whole if name.startswith(f"{path}.")), None)
        ending = next((ending for ending in ENDINGS if name.endswith(ending)), None)
        owner = name.rpartition(".")[0]
        embedding = _embedding_copied(modules, name)
        if root is not None:
            if name.removeprefix(f"{root}.").startswith(LEFT_BY_PEFT):
                ignored.add(PREFIX + name)
        elif ending is not None:
            path = name.removesuffix(ending)
            sites[path] = Site(path, "dense", pattern=path)
        elif name.endswith(TOKENS):
            sites |= sites_at(name.removesuffix(TOKENS), modules)
        elif settings.bias == "all" and name.endswith(".bias") and owner in modules:
            sites.setdefault(owner, Site(owner, "bias", pattern=owner))
        elif embedding is not None:
            copies[PREFIX + name] = embedding
    order = {path: number for number, path in enumerate(modules)}
    ordered = sorted(sites.values(), key=lambda site: order.get(site.path, len(order)))
    return ordered, copies, ignored


def _embedding_copied(modules: Mapping[str, nn.Module], name: str) -> str | None:
    for ending in _COPY_OF_EMBEDDING:
        module = modules.get(name.removesuffix(ending)) if name.endswith(ending) else None
        if isinstance(module, nn.Embedding | nn.Linear):
            return name.removesuffix(ending) + ".weight"
    return None


def lora_of(
    modules: Mapping[str, nn.Module],
    settings: PeftSettings,
    sites: list[Site],
    header: Mapping[str, TensorInfo],
) -> LoRA:
    """The method that makes these sites' deltas, at the ranks and scalings PEFT gave them.

    Errors: `ConfigError` for settings that no LoRA of ours can have; `ValueError` where no site
    has factors, or a rank does not divide into the groups of its convolution.
    """
    dense = [site.path for site in sites if site.kind == "dense"]
    if not dense:
        raise ValueError(f"{WEIGHTS}: holds no lora_A and lora_B tensors")
    ranks, alphas = _in_groups(dense, modules, settings)
    r, rank_pattern = per_path(ranks)
    alpha, alpha_pattern = per_path(alphas)
    return LoRA(
        r=r,
        alpha=alpha,
        dropout=settings.dropout,
        targets=tuple(dense),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        bias=settings.bias,  # type: ignore[arg-type]
        train_whole=tuple(s.path for s in sites if s.kind == "whole"),
        scaling="alpha/sqrt(r)" if settings.rslora else "alpha/r",
        dtype=dtype_of(info.dtype for key, info in header.items() if key.endswith(ENDINGS[:4])),
        dora=settings.dora,
        token_rows=settings.token_rows,
    )


def _in_groups(
    paths: Iterable[str], modules: Mapping[str, nn.Module], settings: PeftSettings
) -> tuple[dict[str, int], dict[str, float]]:
    """Ranks and alphas of one group of each module; only a grouped convolution has several.

    Errors: `ValueError` for a rank that does not divide into them.
    """
    ranks, alphas = {}, {}
    for path in paths:
        view = view_of(modules[path]) if path in modules else None
        groups = groups_of(view) if view else 1
        rank = settings.rank_at(path)
        if rank % groups:
            raise ValueError(f"{path}: rank {rank} does not divide into {groups} groups")
        ranks[path] = rank // groups
        alphas[path] = settings.alpha_at(path) / (groups**0.5 if settings.rslora else groups)
    return ranks, alphas


def dtype_of(stored: Iterable[str]) -> Dtype:
    """The dtype setting for factors stored so, by safetensors' names: float32 where they differ."""
    found = set(stored)
    return _DTYPES.get(found.pop(), "float32") if len(found) == 1 else "float32"


def per_path(values: Mapping[str, T]) -> tuple[T, dict[str, T]]:
    """A default and per-module patterns that give each path its value."""
    default = commonest(values.values())
    others = {path: value for path, value in values.items() if value != default}
    if any(name_matches(key, path) for key in others for path in values if path not in others):
        others = dict(values)
    # The last match wins: a path comes after every path that is a tail of it.
    ordered = sorted(others, key=lambda path: path.count("."))
    return default, {glob.escape(path): others[path] for path in ordered}
