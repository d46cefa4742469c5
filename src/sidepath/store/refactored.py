"""A saved adapter again with other factors: its folder written anew, without its base (floor 4).

Dimensions: K new rank, I columns, O rows of an adapted matrix.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sidepath.errors import StoreError
from sidepath.methods.lora import LoRA, by_path
from sidepath.store import manifest as manifests
from sidepath.store.folder import refuse_within
from sidepath.store.loading import load_file
from sidepath.store.manifest import Manifest, trusted_manifest
from sidepath.store.peft_config import commonest, patterns_for
from sidepath.store.peft_format import CONFIG, ENDINGS, PAIRS, PREFIX, WEIGHTS, spread_groups
from sidepath.store.saving import merged_record, publish_adapter, saved_beside
from sidepath.store.tensors import file_inside, read_json

Pair = tuple[Tensor, Tensor]
_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""What narrows PEFT's targets further: nothing does where each module is named."""


def write_refactored(
    source: Path,
    target: str | os.PathLike[str],
    factors: Mapping[str, Pair],
    record: Mapping[str, Any],
) -> Path:
    """Write the adapter of `source` with the update `B A` at each module that `factors` names.

    `factors`: A (K, I) and B (O, K) by module path, scaling included; K may differ between
    modules. Modules that are not named lose their update; whole modules, biases and what was
    saved beside them stay. Each factor keeps the data type it had. A folder of ours keeps its
    manifest (its base, and `record` over the earlier one), a folder of PEFT's stays one. Parts of a
    fused projection become one update of the whole matrix, zero in the rows that had none.
    `source` is not changed; all or nothing. Returns the folder.

    Errors: `StoreError` for a target in the source, or no update left; `DamagedAdapter` for a
    source that cannot be trusted; `WriteFailed`.
    """
    target = Path(target)
    refuse_within([source], target)
    if not factors:
        raise StoreError("an adapter without any update left is not written", where=source)
    old = load_file(file_inside(source, WEIGHTS))
    new = _tensors(old, factors)
    manifest = _manifest(source, factors, record)
    files = saved_beside(source, manifest)
    publish_adapter(target, new, _settings(source, factors, new), manifest, files)
    return target


def _tensors(old: Mapping[str, Tensor], factors: Mapping[str, Pair]) -> dict[str, Tensor]:
    """The file's tensors: new factors in the form and data type of the old ones."""
    new = {key: tensor for key, tensor in old.items() if not key.endswith(ENDINGS[:4])}
    for name, (A_KI, B_OK) in factors.items():
        keys = keys_at(name, old)
        if keys is None:
            raise StoreError("the adapter has no update there", found=name)
        A_old, B_old = (old[key] for key in keys)
        new |= zip(
            keys, formed(A_KI.to(A_old.dtype), B_OK.to(B_old.dtype), A_old, B_old), strict=True
        )
    return new


def keys_at(path: str, tensors: Container[str]) -> tuple[str, str] | None:
    """Under which keys of a file the A and B of a module are; None where it has none."""
    for ends_A, ends_B in PAIRS:
        if PREFIX + path + ends_A in tensors:
            return PREFIX + path + ends_A, PREFIX + path + ends_B
    return None


def formed(A_KI: Tensor, B_OK: Tensor, A_old: Tensor, B_old: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of an (O, I) matrix in the form on disk that `A_old` and `B_old` have; copies."""
    if A_old.dim() > 2:  # a convolution
        groups = A_old.shape[0] // B_old.shape[1]
        kernel = A_old.shape[2:]
        A_KI = spread_groups(A_KI.reshape(len(A_KI), A_old.shape[1] // groups, *kernel), groups)
        B_OK = B_OK.reshape(*B_OK.shape, *B_old.shape[2:])
    return A_KI.contiguous().clone(), B_OK.contiguous().clone()


def _settings(
    source: Path, factors: Mapping[str, Pair], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """PEFT's settings with the ranks that the file has now, and factors that are scaled already."""
    settings: dict[str, Any] = read_json(file_inside(source, CONFIG))
    keys = {path: keys_at(path, tensors) for path in factors}
    ranks = {path: len(tensors[key[0]]) for path, key in keys.items() if key is not None}
    return settings_for(settings, ranks, ranks)


def settings_for(
    settings: Mapping[str, Any], ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> dict[str, Any]:
    """PEFT's settings of other updates: at these modules, of these ranks (as the file's A has
    them) and alphas, the factor being alpha/r.
    """
    r, alpha = commonest(ranks.values()), commonest(alphas.values())
    expression = isinstance(settings.get("target_modules"), str)
    return {
        **settings,
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": False,
        "target_modules": "|".join(map(re.escape, ranks)) if expression else list(ranks),
        "rank_pattern": patterns_for(ranks, r),
        "alpha_pattern": patterns_for(alphas, alpha),
    } | {name: None for name in _NARROWING if name in settings}


def _manifest(
    source: Path, factors: Mapping[str, Pair], record: Mapping[str, Any]
) -> Manifest | None:
    if not manifests.is_ours(source):
        return None
    manifest = trusted_manifest(source)
    assert isinstance(manifest.config, LoRA), "factors were read of it"
    dropped = [
        site.path for site in manifest.sites if site.kind == "dense" and site.path not in factors
    ]
    return dataclasses.replace(
        manifest,
        config=_config(manifest.config, factors, dropped),
        sites=tuple(
            dataclasses.replace(site, parts=())
            for site in manifest.sites
            if site.path not in dropped
        ),
        record=merged_record(manifest.record, None, record),
    )


def _config(config: LoRA, factors: Mapping[str, Pair], dropped: list[str]) -> LoRA:
    return dataclasses.replace(
        config,
        **scaled_already({path: len(A_KI) for path, (A_KI, _) in factors.items()}),
        scaling="alpha/r",
        start="kaiming",
        targets=tuple(pattern.partition(":")[0] for pattern in config.targets),
        exclude=(*config.exclude, *map(glob.escape, dropped)),
    )


def scaled_already(ranks: Mapping[str, int]) -> dict[str, Any]:
    """LoRA's settings of factors at these ranks that carry their scaling: alpha is the rank."""
    r = commonest(ranks.values())
    patterns = by_path(ranks, usual=r)
    alphas = {pattern: float(rank) for pattern, rank in patterns.items()}
    return {"r": r, "alpha": float(r), "rank_pattern": patterns, "alpha_pattern": alphas}
