"""LoRA adapters for llama.cpp and Ollama: one GGUF file (floor 5).

Dimensions: R rank, I columns, O rows.

    <tensor>.lora_a (R, I), lora_b (O, R):  W' = W0 + (alpha / R) b a
    token_embd.weight.lora_a (I, R):        rows are looked up by token

One `adapter.lora.alpha` holds for all, and each tensor's own R divides it: ranks may differ, and a
scale that is not alpha / R is folded into b. Everything is stored in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidepath.convert.folding import one_alpha
from sidepath.convert.gguf_header import MAGIC, read_gguf_header
from sidepath.convert.gguf_names import (
    HEADS,
    KEY_HEADS,
    Heads,
    architecture_of,
    matrices_of,
    permuted,
    require_gguf,
    rows_in_halves,
    rows_in_pairs,
    tensor_names,
)
from sidepath.convert.outside import both_factors, names_of, scale_from
from sidepath.convert.passport import Passport, as_text, parse, paths_of, restored
from sidepath.convert.portable import (
    Options,
    Portable,
    Update,
    portable_of,
    require_sayable,
)
from sidepath.errors import ConfigError, DamagedAdapter, StoreError
from sidepath.store.loading import load_tensors

_PASSPORT = "sidepath.passport"
_EMBEDDING = "token_embd.weight"
_ENDINGS = (".lora_a", ".lora_b")
_ALPHA = "adapter.lora.alpha"
_FIXED = {"general.type": "adapter", "adapter.type": "lora"}


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == MAGIC


def write(portable: Portable, path: Path, options: Options) -> list[str]:
    """Write one file; returns notes. The base tells llama.cpp's names and the heads.

    Errors: `ConfigError` without a base; `StoreError` that names all that GGUF has no place for;
    `MissingExtra`.
    """
    if options.base is None:
        raise ConfigError(
            "llama.cpp's names of an adapter's tensors follow from its base",
            hint="give the base's folder, or its config.json: --base BASE",
        )
    gguf = require_gguf()
    updates = require_sayable(portable, "GGUF", embeddings=True)
    architecture, heads = architecture_of(options.base)
    names = tensor_names(architecture, matrices_of(options.base))
    _refuse_unnamed(updates, names, options)
    folded = one_alpha(updates)
    with closing(gguf.GGUFWriter(path, architecture)) as writer:
        _write_keys(writer, architecture, next(iter(folded.updates.values())).alpha, heads)
        writer.add_string(_PASSPORT, as_text(portable))
        for one_path, one in folded.updates.items():
            for ending, tensor in zip(_ENDINGS, _stored(names[one_path], one, heads), strict=True):
                writer.add_tensor(names[one_path] + ending, tensor.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return folded.notes()


def _write_keys(writer: Any, architecture: str, alpha: float, heads: Heads | None) -> None:
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32(_ALPHA, alpha)
    if heads is not None:
        writer.add_uint32(HEADS.format(architecture), heads.query)
        writer.add_uint32(KEY_HEADS.format(architecture), heads.key)


def _stored(name: str, one: Update, heads: Heads | None) -> tuple[Tensor, Tensor]:
    """A and B of an update as the file holds them."""
    count = heads.of(name) if heads is not None else None
    B = one.B if count is None else rows_in_pairs(one.B, count)
    return (one.A.T if name == _EMBEDDING else one.A), B


def _refuse_unnamed(
    updates: Mapping[str, Update], names: Mapping[str, str], options: Options
) -> None:
    assert options.base is not None
    config: Any = options.base.model.config
    tied = config.get_text_config().tie_word_embeddings
    ends = (_EMBEDDING, "output.weight")
    faults = [f"{path}: llama.cpp has no such matrix" for path in updates if path not in names]
    faults += [
        f"{path}: embedding and head are one matrix in this base, which llama.cpp would adapt twice"
        for path in updates
        if tied and names.get(path) in ends
    ]
    faults += [
        f"{path}: {update.A.dtype} holds more digits than float32"
        for path, update in updates.items()
        if torch.float64 in (update.A.dtype, update.B.dtype)
    ]
    if faults:
        raise StoreError("the adapter cannot be said in GGUF; nothing was written", faults=faults)


def read(path: Path, options: Options) -> Portable:
    """Read a GGUF adapter; where it is not one of ours, the base tells the modules' names.

    Errors: `DamagedAdapter` with all faults; `ConfigError` without a base; `MissingExtra`.
    """
    keys, header = read_gguf_header(path)
    alpha, faults = _alpha(keys)
    if faults:
        raise DamagedAdapter("the file is no LoRA adapter", where=path, faults=faults)
    text = keys.get(_PASSPORT)
    passport = None if text is None else parse(text, path)
    paths, heads = _names(keys, passport, options, path)
    tensors = load_tensors(path, header)
    updates, faults = _updates(tensors, paths, heads, alpha)
    if not updates and not faults:
        faults.append("no lora_a and lora_b tensors")
    if faults:
        raise DamagedAdapter("the GGUF adapter cannot be read", where=path, faults=faults)
    if passport is not None:
        return restored(passport, updates, path)
    return portable_of(updates, options=options)


def _alpha(keys: Mapping[str, Any]) -> tuple[float, list[str]]:
    faults = [
        f"{key}: {keys.get(key)!r}, expected {value!r}"
        for key, value in _FIXED.items()
        if keys.get(key) != value
    ]
    if not isinstance(keys.get("general.architecture"), str):
        faults.append("general.architecture: missing")
    if _PASSPORT in keys and not isinstance(keys[_PASSPORT], str):
        faults.append(f"{_PASSPORT}: expected a text")
    alpha = keys.get(_ALPHA, 0.0)
    if alpha == 0.0:  # then llama.cpp does not divide by the rank: the scale is 1
        return 0.0, faults
    try:
        return scale_from(alpha), faults
    except ValueError as error:
        return 0.0, [*faults, f"{_ALPHA}: {error}"]


def _names(
    keys: Mapping[str, Any], passport: Passport | None, options: Options, path: Path
) -> tuple[dict[str, str], Heads | None]:
    """The module path of each of llama.cpp's names, and the heads that rows are ordered by."""
    architecture = keys["general.architecture"]
    if options.base is not None:
        expected, heads = architecture_of(options.base)
        if expected != architecture:
            raise StoreError(
                "the adapter is one for another kind of base",
                where=path,
                found=architecture,
                expected=expected,
            )
        names = tensor_names(architecture, matrices_of(options.base))
    elif passport is not None:
        heads = _heads(keys, architecture, path) if permuted(architecture) else None
        names = tensor_names(architecture, paths_of(passport))
    else:
        raise ConfigError(
            "the names of the base's modules are not in the file",
            where=path,
            hint="give the base's folder, or its config.json: --base BASE",
        )
    return {name: one for one, name in names.items()}, heads


def _heads(keys: Mapping[str, Any], architecture: str, path: Path) -> Heads:
    query, key = (keys.get(name.format(architecture)) for name in (HEADS, KEY_HEADS))
    if type(query) is not int or type(key) is not int or min(query, key) < 1:
        raise DamagedAdapter(
            "the file does not say how many heads its base has",
            where=path,
            hint="give the base's folder, or its config.json: --base BASE",
        )
    return Heads(query, key)


def _updates(
    tensors: Mapping[str, Tensor], paths: Mapping[str, str], heads: Heads | None, alpha: float
) -> tuple[dict[str, Update], list[str]]:
    faults = [f"{key}: unexpected" for key in tensors if not key.endswith(_ENDINGS)]
    found: dict[str, Update] = {}
    for name in sorted(names_of(tensors, _ENDINGS)):
        A, B = (tensors.get(name + ending) for ending in _ENDINGS)
        try:
            if name not in paths:
                raise ValueError("the base has no such matrix")
            found[paths[name]] = _update(name, A, B, heads, alpha)
        except ValueError as error:
            faults.append(f"{name}: {error}")
    return found, faults


def _update(
    name: str, A: Tensor | None, B: Tensor | None, heads: Heads | None, alpha: float
) -> Update:
    embedding = name == _EMBEDDING
    if embedding and A is not None and A.dim() == 2:
        A = A.T.contiguous()
    A, B = both_factors(A, B, ("lora_a", "lora_b"))
    count = heads.of(name) if heads is not None else None
    if count is not None:
        if len(B) % (2 * count):
            raise ValueError(f"lora_b has {len(B)} rows, which are no {count} heads")
        B = rows_in_halves(B, count)
    return Update(A, B, alpha / len(A) if alpha else 1.0, embedding)
