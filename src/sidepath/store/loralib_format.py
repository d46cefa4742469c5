"""loralib's state dicts: `….lora_A` and `….lora_B` beside the base's names (floor 4).

Dimensions: O out, I in, R rank, N enabled parts of M equal ones, K kernel side, G groups.

    Linear, Embedding   lora_A (R, I), lora_B (O, R)             ΔW = s B A
    MergedLinear        lora_A (N R, I), lora_B (N O/M, R)       part i of W: s B_i A_i
    Conv2d              lora_A (R K, C K), lora_B (O/G K, R K)   ΔW = s (B A) read as (O, C/G, K, K)

The factor is s = alpha / R, and alpha is not in the file: the caller must know it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sidepath.core.views import DenseView, view_of
from sidepath.errors import DamagedAdapter, nearest
from sidepath.injection.architecture import modules_of
from sidepath.injection.registry import check_name, registry_of
from sidepath.injection.surgery import refuse_merged
from sidepath.kernels.lowrank import Part
from sidepath.methods.base import Site
from sidepath.methods.lora import LoRA, name_matches
from sidepath.store.adapter import Adapter, stand_up
from sidepath.store.loading import load_file
from sidepath.store.peft_reading import dtype_of, per_path
from sidepath.store.tensors import DTYPE_NAMES

FACTORS = (".lora_A", ".lora_B")
"""Endings of a layer's A and B."""
_ENDINGS = dict(zip((*FACTORS, ".bias"), ("A", "B", "bias"), strict=True))


@dataclass(frozen=True)
class _Read:
    """One layer of the file in our own form."""

    A_RI: Tensor
    B_OR: Tensor
    r: int
    alpha: float
    parts: tuple[Part, ...] = ()


def load_loralib(
    model: nn.Module,
    source: Mapping[str, Tensor] | str | os.PathLike[str],
    *,
    alpha: float,
    fused: Mapping[str, Sequence[bool]] | None = None,
    name: str = "loralib",
    trainable: bool = False,
) -> Adapter:
    """Load a loralib state dict, in memory or a safetensors file. Changes `model` in place.

    `alpha` is loralib's `lora_alpha` (the file does not hold it). `fused` says, for each fused
    projection by name or pattern, which of its equal parts are adapted (`enable_lora`), as in
    `{"c_attn": (True, False, True)}`. Keys must be exactly the adapter's: `lora_A`, `lora_B`
    and biases. Which base it belongs to is not in the file and is not checked.

    Errors: `StoreError` for a pickle (with the line that converts it), `DamagedAdapter` with
    all faults, `ConfigError`, `NameTaken`, `BadName`, `MergeError`.
    """
    check_name(registry_of(model), name)
    refuse_merged(registry_of(model), f'"{name}" cannot be loaded')
    state = dict(source) if isinstance(source, Mapping) else load_file(source)
    where = None if isinstance(source, Mapping) else source
    config, sites, tensors = read_state(model, state, alpha, fused or {}, where)
    return stand_up(model, config, name, sites, tensors, trainable)


def read_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    alpha: float,
    fused: Mapping[str, Sequence[bool]],
    where: object = None,
) -> tuple[LoRA, list[Site], dict[str, dict[str, Tensor]]]:
    """A loralib state dict as a method, its sites and their deltas' tensors; changes nothing.

    See `load_loralib`; of the model, names and shapes are looked at. Errors: `DamagedAdapter`.
    """
    modules = dict(modules_of(model))
    found, faults = _by_path(state, modules)
    layers: dict[str, _Read] = {}
    for path in [path for path in found if "A" in found[path] or "B" in found[path]]:
        enabled = [tuple(on) for key, on in fused.items() if name_matches(key, path)]
        try:
            layers[path] = _read_layer(modules[path], found[path], alpha, enabled[-1:])
        except ValueError as error:
            faults.append(f"{path}: {error}")
    if not layers and not faults:
        faults.append("no lora_A and lora_B tensors")
    if faults:
        raise DamagedAdapter("the loralib weights do not fit", where=where, faults=faults)
    config, sites = _config(modules, found, layers)
    return config, sites, _own_tensors(sites, found, layers)


def _by_path(
    state: Mapping[str, Tensor], modules: Mapping[str, nn.Module]
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    found: dict[str, dict[str, Tensor]] = {}
    faults = []
    for key, tensor in state.items():
        ending = next((ending for ending in _ENDINGS if key.endswith(ending)), None)
        path = key.removesuffix(ending or "")
        if ending is None:
            faults.append(f"{key}: unexpected; save with loralib.lora_state_dict")
        elif path not in modules:
            close = nearest(path, modules)
            faults.append(
                f"{key}: the base has no such module" + (f", but {close}" if close else "")
            )
        elif tensor.dtype not in DTYPE_NAMES or not bool(torch.isfinite(tensor).all()):
            faults.append(f"{key}: {tensor.dtype} or not finite, expected finite floating numbers")
        else:
            found.setdefault(path, {})[_ENDINGS[ending]] = tensor
    return found, faults


def _read_layer(
    module: nn.Module, found: Mapping[str, Tensor], alpha: float, enabled: list[tuple[bool, ...]]
) -> _Read:
    view = view_of(module)
    if view is None:
        raise ValueError(f"{type(module).__name__} holds no matrix to adapt")
    if "A" not in found or "B" not in found:
        raise ValueError("lora_A or lora_B is missing")
    A, B = found["A"], found["B"]
    bias = found.get("bias")
    if A.dim() != 2 or B.dim() != 2 or not A.numel() or not B.numel():
        raise ValueError(f"lora_A {list(A.shape)} and lora_B {list(B.shape)}, expected matrices")
    if bias is not None and (view.bias is None or bias.shape != view.bias.shape):
        raise ValueError(f"bias {list(bias.shape)} does not fit the base's")
    if view.kind == "conv":
        return _read_conv(view, A, B, alpha)
    rows, columns = view.shape
    parts = _parts(rows, enabled[0]) if enabled else ()
    r = B.shape[1]
    adapted = sum(stop - start for start, stop in parts) if parts else rows
    expected_A, expected_B = (r * (len(parts) or 1), columns), (adapted, r)
    if A.shape != expected_A or B.shape != expected_B:
        raise ValueError(
            f"lora_A {list(A.shape)} and lora_B {list(B.shape)}, expected {list(expected_A)} and "
            f"{list(expected_B)}"
            + ("" if enabled else "; say which parts are adapted if it is fused")
        )
    return _Read(A, B, r, alpha, parts)


def _parts(rows: int, enabled: tuple[bool, ...]) -> tuple[Part, ...]:
    if not any(enabled) or rows % len(enabled):
        raise ValueError(f"{rows} rows cannot be {len(enabled)} equal parts with some adapted")
    size = rows // len(enabled)
    return tuple((i * size, (i + 1) * size) for i, on in enumerate(enabled) if on)


def _read_conv(view: DenseView, A: Tensor, B: Tensor, alpha: float) -> _Read:
    """Loralib's product, read row by row as the kernel: row o of ΔW is K/G rows of `B A`.

    So B's rows join in K/G blocks and A repeats along a diagonal: exact, at rank K/G · R K.
    """
    kernel = view.weight.shape[2:]
    groups = int(view.module.groups)  # type: ignore[arg-type]
    side = kernel[0]
    if len(kernel) != 2 or kernel[1] != side or side % groups:
        raise ValueError("only Conv2d with a square kernel that its groups divide can be read")
    channels = view.weight.shape[1] * groups
    r = A.shape[0] // side
    expected_A, expected_B = (r * side, channels * side), (view.shape[0] // groups * side, r * side)
    if r < 1 or A.shape != expected_A or B.shape != expected_B:
        raise ValueError(
            f"lora_A {list(A.shape)} and lora_B {list(B.shape)}, expected {list(expected_A)} and "
            f"{list(expected_B)}"
        )
    blocks = side // groups
    rank = blocks * r * side
    A_blocks: Tensor = torch.block_diag(*[A] * blocks)  # type: ignore[no-untyped-call]
    return _Read(A_blocks, B.reshape(-1, rank), rank, alpha / r * rank)


def _config(
    modules: Mapping[str, nn.Module],
    found: Mapping[str, Mapping[str, Tensor]],
    layers: Mapping[str, _Read],
) -> tuple[LoRA, list[Site]]:
    r, rank_pattern = per_path({path: layer.r for path, layer in layers.items()})
    alpha, alpha_pattern = per_path({path: layer.alpha for path, layer in layers.items()})
    others = [path for path in modules if path in found and path not in layers]
    with_bias = any("bias" in found[path] for path in layers)
    config = LoRA(
        r=r,
        alpha=alpha,
        targets=tuple(layers),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        bias="all" if others else "lora" if with_bias else "none",
        dtype=dtype_of(DTYPE_NAMES[layer.A_RI.dtype] for layer in layers.values()),
    )
    sites = [
        Site(path, "dense", layers[path].parts, path)
        if path in layers
        else Site(path, "bias", pattern=path)
        for path in modules
        if path in found
    ]
    return config, sites


def _own_tensors(
    sites: list[Site], found: Mapping[str, Mapping[str, Tensor]], layers: Mapping[str, _Read]
) -> dict[str, dict[str, Tensor]]:
    """Each delta's tensors, copied: those that came in belong to who gave them."""
    tensors: dict[str, dict[str, Tensor]] = {}
    for site in sites:
        own = tensors[site.path] = {}
        if site.path in layers:
            layer = layers[site.path]
            own |= {"A": layer.A_RI.detach().clone(), "B": layer.B_OR.detach().clone()}
        if "bias" in found[site.path]:
            own["bias"] = found[site.path]["bias"].detach().clone()
    return tensors
