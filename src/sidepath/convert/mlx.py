"""Adapters of mlx-lm: `adapters.safetensors` and `adapter_config.json` (floor 5).

Dimensions: R rank, I columns, O rows.

    lora_a (I, R), lora_b (R, O), m (O):  W' = m (W0 + s (a b)^T) / |...|  (m with DoRA only)

One rank and one scale s hold for all; `keys` names the modules, within a block (then the last
`num_layers` blocks have them) or by the whole path. So ranks are padded with zeros, and a scale
of its own is folded into b. mlx-lm reads its settings by name and passes over others: there the
passport is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sidepath.convert.folding import one_rank, one_scaling
from sidepath.convert.outside import names_of, scale_from
from sidepath.convert.passport import KEY, checked, passport_of, paths_of, restored
from sidepath.convert.portable import (
    Base,
    Options,
    Portable,
    Update,
    portable_of,
    require_sayable,
)
from sidepath.errors import DamagedAdapter, StoreError
from sidepath.injection.architecture import block_index, block_of, modules_of
from sidepath.store.loading import load_tensors
from sidepath.store.peft_config import dropout_from, rank_from
from sidepath.store.peft_format import CONFIG
from sidepath.store.tensors import file_inside, read_header, read_json

WEIGHTS = "adapters.safetensors"
_ENDINGS = (".lora_a", ".lora_b", ".m")
_EMBEDDINGS = ("embed_tokens", "wte", "tok_embeddings", "word_embeddings", "token_embedding")
_TYPES = ("lora", "dora")
_READERS = {"scale": scale_from, "dropout": dropout_from, "rank": rank_from}
_DEFAULTS = {"dropout": 0.0}


def is_mlx(path: Path) -> bool:
    """Whether a path is a folder of mlx-lm's."""
    return (path / WEIGHTS).is_file()


def write(portable: Portable, folder: Path, options: Options) -> list[str]:
    """Write the two files into an empty folder; returns notes.

    Errors: `StoreError` that names all that mlx-lm has no place for.
    """
    updates = require_sayable(portable, "mlx-lm", dora=True, embeddings=True)
    _refuse_tied(updates, options.base)
    folded = one_scaling(updates)
    padded = one_rank(folded.updates)
    r = next(iter(padded.values())).r
    dora = portable.settings.dora
    keys, blocks = _keys(list(updates), options.base)
    values = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": blocks,
        "lora_parameters": {
            "rank": r,
            "scale": next(iter(padded.values())).scaling,
            "dropout": portable.settings.dropout,
            "keys": keys,
        },
        KEY: passport_of(portable),
    }
    tensors: dict[str, Tensor] = {}
    for path, one in padded.items():
        parts = (one.A.T, one.B.T, one.magnitude)
        tensors |= {
            path + ending: tensor.contiguous().clone()
            for ending, tensor in zip(_ENDINGS, parts, strict=True)
            if tensor is not None
        }
    save_file(tensors, folder / WEIGHTS)
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    return folded.notes()


def _refuse_tied(updates: Mapping[str, Update], base: Base | None) -> None:
    paths = [path for path, one in updates.items() if one.embedding]
    if not paths:
        return
    tied = base is None or base.model.config.get_text_config().tie_word_embeddings  # type: ignore[union-attr, operator]
    if tied:
        raise StoreError(
            "mlx-lm applies the update of a tied embedding to the head as well; nothing was written"
            if base is not None
            else "whether the embedding is tied to the head is not "
            "known: mlx-lm would then update the head as well",
            faults=paths,
            hint="keep it in PEFT's format" if base is not None else "give --base",
        )


def _keys(paths: Sequence[str], base: Base | None) -> tuple[list[str], int]:
    """`keys` and `num_layers`: within the blocks where the last ones have them all, else whole."""
    blocks = (
        {}
        if base is None
        else {
            block_of(path): block_index(path)
            for path, _ in modules_of(base.model)
            if block_of(path) is not None
        }
    )
    within: dict[int, set[str]] = {}
    for path in paths:
        block = block_of(path)
        if block in blocks:
            within.setdefault(int(block_index(path) or 0), set()).add(path[len(str(block)) + 1 :])
    last = sorted(int(index or 0) for index in blocks.values())[-len(within) :] if within else []
    outside = [path for path in paths if block_of(path) not in blocks]
    names = next(iter(within.values()), set())
    if not blocks or sorted(within) != last or any(one != names for one in within.values()):
        return sorted(paths), len(blocks) or 1
    return [*sorted(names), *outside], len(within)


def read(folder: Path, options: Options) -> Portable:
    """Read a folder of mlx-lm's. Errors: `DamagedAdapter` with all faults; `StoreError`."""
    try:
        values = read_json(file_inside(folder, CONFIG))
    except ValueError as error:
        raise DamagedAdapter(f"{CONFIG} is not JSON", where=folder, found=error) from error
    settings, faults = _settings(values)
    if faults:
        raise DamagedAdapter(f"{CONFIG} cannot be read", where=folder, faults=faults)
    path = file_inside(folder, WEIGHTS)
    passport = checked(values[KEY], folder) if KEY in values else None
    embeddings = {} if passport is None else paths_of(passport)
    tensors = load_tensors(path, read_header(path))
    updates, faults = _updates(tensors, settings["scale"], settings["rank"])
    dora = values.get("fine_tune_type") == "dora"
    faults += [
        f"{name}: fine_tune_type is {'dora' if dora else 'lora'}, and m is "
        f"{'missing' if dora else 'there'}"
        for name, one in updates.items()
        if dora != (one.magnitude is not None)
    ]
    if not updates and not faults:
        faults.append("no lora_a and lora_b tensors")
    if faults:
        raise DamagedAdapter("mlx-lm's weights cannot be read", where=path, faults=faults)
    modules = {} if options.base is None else dict(modules_of(options.base.model))
    for name, one in updates.items():
        embedding = embeddings.get(name, _is_embedding(name, modules))
        updates[name] = replace(one, embedding=embedding)
    if passport is not None:
        return restored(passport, updates, folder)
    return portable_of(updates, options=options, dropout=settings["dropout"])


def _settings(values: Any) -> tuple[dict[str, Any], list[str]]:
    """Scale, dropout and rank of a settings file, and all that is wrong with it."""
    if not isinstance(values, dict):
        return {}, ["not a JSON object"]
    kind = values.get("fine_tune_type", "lora")
    faults = []
    if kind not in _TYPES:
        faults.append(f"fine_tune_type {kind!r}, expected one of {', '.join(_TYPES)}")
    named = values.get("lora_parameters")
    if not isinstance(named, dict):
        return {}, [*faults, "lora_parameters is no table"]
    found = {}
    for name, reader in _READERS.items():
        try:
            found[name] = reader(named.get(name, _DEFAULTS.get(name)))
        except ValueError as error:
            faults.append(f"lora_parameters.{name}: {error}")
    return found, faults


def _updates(
    tensors: Mapping[str, Tensor], scale: float, r: int
) -> tuple[dict[str, Update], list[str]]:
    faults = [f"{key}: unexpected" for key in tensors if not key.endswith(_ENDINGS)]
    found = {}
    for name in sorted(names_of(tensors, _ENDINGS)):
        a, b, m = (tensors.get(name + ending) for ending in _ENDINGS)
        if a is None or b is None:
            faults.append(f"{name}: lora_a or lora_b is missing")
        elif a.dim() != 2 or b.dim() != 2:
            faults.append(f"{name}: {a.dim()} dimensions; a mixture's experts are not supported")
        elif a.shape[1] != r or b.shape[0] != r or 0 in (*a.shape, *b.shape):
            faults.append(
                f"{name}: lora_a {list(a.shape)} and lora_b {list(b.shape)}, expected rank {r}"
            )
        elif m is not None and m.shape != b.shape[1:]:
            faults.append(f"{name}: m {list(m.shape)}, expected {list(b.shape[1:])}")
        else:
            found[name] = Update(a.T.contiguous(), b.T.contiguous(), scale, magnitude=m)
    return found, faults


def _is_embedding(path: str, modules: Mapping[str, Any]) -> bool:
    if modules:
        return type(modules.get(path)).__name__ == "Embedding"
    return path.rpartition(".")[2] in _EMBEDDINGS
