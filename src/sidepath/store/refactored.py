"""A saved adapter again with other factors: its folder written anew, without its base (floor 4).

Dimensions: K new rank, I columns, O rows of an adapted matrix.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sidepath.errors import DamagedAdapter, StoreError
from sidepath.methods.lora import LoRA, by_path
from sidepath.store import manifest as manifests
from sidepath.store.card import CARD, model_card
from sidepath.store.folder import publish
from sidepath.store.loading import load_tensors
from sidepath.store.manifest import Manifest, read_manifest, write_manifest
from sidepath.store.peft_config import anchored, commonest
from sidepath.store.peft_format import CONFIG, ENDINGS, PREFIX, WEIGHTS, spread_groups
from sidepath.store.saving import OWN_NAMES, merged_record, plain_peft
from sidepath.store.tensors import DTYPE_NAMES, file_inside, read_header, read_json

Pair = tuple[Tensor, Tensor]
_PAIRS = (ENDINGS[0:2], ENDINGS[2:4])


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

    Errors: `StoreError` for the same folder twice, or no update left; `DamagedAdapter` for a
    source that cannot be trusted; `WriteFailed`.
    """
    target = Path(target)
    if os.path.realpath(source) == os.path.realpath(target):
        raise StoreError("an adapter is not written over the one it comes from", where=target)
    if not factors:
        raise StoreError("an adapter without any update left is not written", where=source)
    path = file_inside(source, WEIGHTS)
    old = load_tensors(path, read_header(path))
    new = _tensors(old, factors)
    settings = _settings(source, factors, new)
    manifest = _manifest(source, factors, new, record)
    with publish(target, manifests=(manifests.NAME,), replace=plain_peft) as temporary:
        save_file(new, temporary / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(settings, indent=2) + "\n"
        (temporary / CONFIG).write_text(text, encoding="utf-8")
        if manifest is not None:
            for name in manifest.files:
                if name not in OWN_NAMES:
                    (temporary / name).write_bytes(file_inside(source, name).read_bytes())
            card = model_card(manifest, target.name, sum(tensor.numel() for tensor in new.values()))
            (temporary / CARD).write_text(card, encoding="utf-8")
            write_manifest(temporary, manifest)
    return target


def _tensors(old: Mapping[str, Tensor], factors: Mapping[str, Pair]) -> dict[str, Tensor]:
    """The file's tensors: new factors in the form and data type of the old ones."""
    new = {key: tensor for key, tensor in old.items() if not key.endswith((*_PAIRS[0], *_PAIRS[1]))}
    for name, (A_KI, B_OK) in factors.items():
        pair = next((pair for pair in _PAIRS if PREFIX + name + pair[0] in old), None)
        if pair is None:
            raise StoreError("the adapter has no update there", found=name)
        keys = [PREFIX + name + ending for ending in pair]
        A_old, B_old = (old[key] for key in keys)
        A, B = A_KI.to(A_old.dtype), B_OK.to(B_old.dtype)
        if A_old.dim() > 2:  # a convolution
            groups = A_old.shape[0] // B_old.shape[1]
            A = spread_groups(A.reshape(len(A), A_old.shape[1] // groups, *A_old.shape[2:]), groups)
            B = B.reshape(*B.shape, *B_old.shape[2:])
        new |= {key: t.contiguous().clone() for key, t in zip(keys, (A, B), strict=True)}
    return new


def _settings(
    source: Path, factors: Mapping[str, Pair], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """PEFT's settings with the ranks that the file has now, and factors that are scaled already."""
    settings: dict[str, Any] = read_json(file_inside(source, CONFIG))
    expression = isinstance(settings.get("target_modules"), str)
    ranks = {
        path: len(tensors[PREFIX + path + ending])
        for path in factors
        for ending in (_PAIRS[0][0], _PAIRS[1][0])
        if PREFIX + path + ending in tensors
    }
    r = commonest(ranks.values())
    others = {anchored(path): rank for path, rank in ranks.items() if rank != r}
    return settings | {
        "r": r,
        "lora_alpha": r,
        "use_rslora": False,
        "target_modules": "|".join(map(re.escape, ranks)) if expression else list(ranks),
        "rank_pattern": others,
        "alpha_pattern": dict(others),
    }


def _manifest(
    source: Path,
    factors: Mapping[str, Pair],
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any],
) -> Manifest | None:
    if not (source / manifests.NAME).exists():
        return None
    manifest, faults = read_manifest(source)
    if manifest is None or faults:
        raise DamagedAdapter("the adapter cannot be trusted", where=source, faults=faults)
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
        tensors={key: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for key, t in tensors.items()},
        record=merged_record(manifest.record, None, record),
    )


def _config(config: LoRA, factors: Mapping[str, Pair], dropped: list[str]) -> LoRA:
    ranks = {path: len(A_KI) for path, (A_KI, _) in factors.items()}
    r = commonest(ranks.values())
    patterns = by_path(ranks, usual=r)
    return dataclasses.replace(
        config,
        r=r,
        alpha=float(r),
        scaling="alpha/r",
        start="kaiming",
        targets=tuple(pattern.partition(":")[0] for pattern in config.targets),
        exclude=(*config.exclude, *map(glob.escape, dropped)),
        rank_pattern=patterns,
        alpha_pattern={pattern: float(rank) for pattern, rank in patterns.items()},
    )
