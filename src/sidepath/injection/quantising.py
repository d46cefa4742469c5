"""A 4-bit base out of a loaded model, and a plain one out of a 4-bit base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sidepath.core.quant import (
    can_pack,
    hold_still,
    is_packed,
    packed_linear,
    plain_linear,
    require_bitsandbytes,
)
from sidepath.errors import MergeError, UnsupportedModule
from sidepath.injection.architecture import modules_of
from sidepath.injection.body import head_paths, output_embedding
from sidepath.injection.places import preset_paths
from sidepath.injection.registry import registry_of
from sidepath.methods.lora import name_matches

HEAD_PARTS = ("pooler",)
"""Parts inside a transformers body that belong to the head: absent from many checkpoints."""
_PACKABLE = (torch.float32, torch.bfloat16, torch.float16)


def quantise_(
    model: nn.Module,
    *,
    dtype: torch.dtype = torch.bfloat16,
    double: bool = True,
    exclude: tuple[str, ...] = (),
) -> list[str]:
    """Pack the linear layers of the model's body into NF4, in place; returns their paths.

    Heads, embeddings and norms stay as they are, and so do modules that a pattern of `exclude`
    names. Each weight is quantised from the dtype it has, its scales too if `double` (about 4.13
    bits a parameter instead of 4.5); the layers compute in `dtype`, which their biases take. The
    parameters keep their names and are frozen; layers packed already stay as they are. The float
    weights are let go one by one. The inverse, but for what quantising lost, is `dequantise_`.

    A model that is to be stored quantised is loaded with transformers' `BitsAndBytesConfig`.

    Errors: `MissingExtra`, `MergeError` when the model holds adapters, `UnsupportedModule` when
    there is nothing to pack or a weight is of a dtype that cannot be packed.
    """
    require_bitsandbytes()
    _refuse_adapters(model)
    modules = dict(modules_of(model))
    paths = [
        path
        for path in preset_paths(model, "all-linear")
        if can_pack(modules[path]) and not any(name_matches(one, path) for one in exclude)
    ]
    _require_packable({path: modules[path].weight for path in paths})
    return _exchange(model, paths, lambda module: packed_linear(module, dtype=dtype, double=double))


def _require_packable(weights: Mapping[str, object]) -> None:
    if not weights:
        raise UnsupportedModule("no linear layer to pack")
    faults = [
        f"{path}: {weight.dtype} on {weight.device}"
        for path, weight in weights.items()
        if isinstance(weight, Tensor) and (weight.dtype not in _PACKABLE or weight.is_meta)
    ]
    if faults:
        raise UnsupportedModule(
            "these layers cannot be packed into 4 bits",
            expected="weights in float32, bfloat16 or float16",
            faults=faults,
        )


def dequantise_(model: nn.Module, *, dtype: torch.dtype = torch.float32) -> list[str]:
    """Put a plain layer in the place of each 4-bit one, in place; returns their paths.

    Their weights are the dequantised ones, rounded once to `dtype`. A transformers model forgets
    that it was loaded quantised, so that it is saved as a plain one.

    Errors: `MergeError` when the model holds adapters.
    """
    _refuse_adapters(model)
    paths = [path for path, module in modules_of(model) if is_packed(module)]
    _exchange(model, paths, lambda module: plain_linear(module, dtype))
    _forget_packing(model)
    return paths


def _forget_packing(model: nn.Module) -> None:
    """Take off a transformers model what says that it is packed and how it was unpacked."""
    own = vars(model)
    for name in ("is_loaded_in_4bit", "is_quantized", "hf_quantizer", "quantization_method"):
        own.pop(name, None)
    settings = own.get("config")
    if settings is not None:
        vars(settings).pop("quantization_config", None)
        vars(settings).pop("_pre_quantization_dtype", None)
    renamings = own.get("_weight_conversions")
    if renamings is not None:  # how names change on the way to a file; unpacking has no way back
        own["_weight_conversions"] = [
            one
            for one in renamings
            if not any("bitsandbytes" in type(step).__module__ for step in _steps(one))
        ] or None


def _steps(renaming: object) -> list[object]:
    return list(getattr(renaming, "operations", ()))


def left_plain(model: nn.Module) -> list[str]:
    """Modules that a loader must not pack: heads, the output embedding, and what may be new.

    Left to itself, transformers makes a head that no checkpoint holds a 4-bit layer without
    numbers. `model` may be without weights.
    """
    last = output_embedding(model)
    inner = [
        path
        for path, module in modules_of(model)
        if module is last or path.rpartition(".")[2] in HEAD_PARTS
    ]
    return list(dict.fromkeys([*head_paths(model), *inner]))


def keep_heads_plain(settings: Any, skeleton: nn.Module) -> None:
    """Tell the config of a folder that is stored packed which modules a loader must not pack:
    those it names itself, and `left_plain` of the model without weights. In place.
    """
    stored = settings.quantization_config
    values = stored if isinstance(stored, dict) else stored.to_dict()
    kept = {*(values.get("llm_int8_skip_modules") or ()), *left_plain(skeleton)}
    settings.quantization_config = {**values, "llm_int8_skip_modules": sorted(kept)}


def settle(model: nn.Module) -> nn.Module:
    """Keep the 4-bit layers of a freshly loaded model from ever rewriting their weights. In place.

    See `core.quant.hold_still`; injecting does the same for as long as adapters are on the model.
    """
    hold_still(model.modules())
    return model


def _exchange(
    model: nn.Module, paths: list[str], make: Callable[[nn.Module], nn.Module]
) -> list[str]:
    for path in paths:
        parent, _, name = path.rpartition(".")
        holder = model.get_submodule(parent)
        holder._modules[name] = make(model.get_submodule(path))
    return paths


def _refuse_adapters(model: nn.Module) -> None:
    if registry_of(model) is not None:
        raise MergeError(
            "the base's layers cannot be exchanged while the model holds adapters",
            hint="sidepath.remove them first",
        )
