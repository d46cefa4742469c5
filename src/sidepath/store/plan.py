"""What an adapter would be, before anything is made: places, parameters, bytes, memory.

The plan is read off a twin of the model that has every shape and no memory: the adapter is
really put in there, and a training step really counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sidepath.core.quant import state_of
from sidepath.injection.architecture import modules_of
from sidepath.injection.registry import Installed, base_parameters
from sidepath.injection.targets import resolve
from sidepath.methods.base import Method, Site
from sidepath.store.flops import Flops, flops
from sidepath.store.memory import Memory, Shape, Twin
from sidepath.store.plain_format import slots_of
from sidepath.store.tensors import DTYPE_NAMES


@dataclass(frozen=True)
class Plan:
    """What `inject` would do: see `plan`."""

    method: str
    trainable: int
    """Parameters that would be trained."""
    total: int
    """Parameters of the base."""
    adapter_bytes: int
    """Size of the adapter's weights file, its header included."""
    sites: tuple[Site, ...]
    memory: Memory
    batch_size: int
    tokens: int
    dtypes: tuple[str, str]
    """Data types of the base's and of the adapter's weights."""
    flops: Flops
    positions: int = 0
    """Positions of the model's context that the adapter takes from every row."""
    context: int | None = None
    """Positions that the model has, where its config says."""
    gpu_bytes: int | None = None
    """Memory of the GPU that the step is to run on."""

    @property
    def gpu_share(self) -> float | None:
        """The share of the GPU's memory that the step takes; above 1 it does not fit."""
        return None if self.gpu_bytes is None else self.memory.total / self.gpu_bytes

    @property
    def targets(self) -> list[tuple[str, int]]:
        """Each pattern with the number of modules it names."""
        counts: dict[str, int] = {}
        for site in self.sites:
            counts[site.pattern] = counts.get(site.pattern, 0) + 1
        return list(counts.items())

    def as_dict(self) -> dict[str, Any]:
        """The plan as the JSON document of `sidepath plan`."""
        return {
            "method": self.method,
            "trainable": self.trainable,
            "total": self.total,
            "adapter_bytes": self.adapter_bytes,
            "targets": [{"pattern": name, "matched": count} for name, count in self.targets],
            "memory": self.memory.as_dict(),
            "batch_size": self.batch_size,
            "tokens": self.tokens,
            "dtypes": {"base": self.dtypes[0], "adapter": self.dtypes[1]},
            "positions": self.positions,
            "context": self.context,
            "flops_per_token": self.flops.as_dict(),
            "gpu": {"bytes": self.gpu_bytes, "share": self.gpu_share},
            "modules": [site.path for site in self.sites],
        }

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total
        lines = [
            f"method       {self.method}",
            f"trained      {self.trainable:,} parameters, {share:.3g} % of {self.total:,}",
            f"adapter      {readable(self.adapter_bytes)} on disk",
            f"dtypes       base {self.dtypes[0]}, adapter {self.dtypes[1]}",
        ]
        for pattern, count in self.targets:
            lines.append(f"target       {pattern}: {count} modules")
        if self.positions:
            known = "" if self.context is None else f" of {self.context:,}"
            lines.append(f"context      {self.positions:,}{known} positions are the adapter's")
        memory = self.memory
        activations = "unknown" if memory.activations is None else readable(memory.activations)
        lines.append(
            f"memory       {readable(memory.total)} for a step of {self.batch_size} x {self.tokens}"
            f" tokens: weights {readable(memory.weights)}, gradients {readable(memory.gradients)}, "
            f"optimizer {readable(memory.optimizer)}, activations {activations}{_other(memory)}"
        )
        if self.gpu_bytes is not None and self.gpu_share is not None:
            fits = "" if self.gpu_share <= 1 else ": it does not fit"
            size = readable(self.gpu_bytes)
            lines.append(f"GPU          {100 * self.gpu_share:.3g} % of its {size}{fits}")
        lines.append(f"arithmetic   {_told(self.flops)}")
        return "\n".join(lines)


# Over 40 lines: each thing that a step can be, and each field of the plan, has a line of its own.
def plan(
    model: nn.Module,
    config: Method,
    *,
    batch_size: int = 8,
    tokens: int = 128,
    checkpointing: bool = False,
    supervised: float = 1.0,
    padded: bool = True,
    autocast: bool = False,
    logits: int | None = None,
    packed: bool = False,
    fused: bool = True,
    activations: bool = True,
    gpu_bytes: int | None = None,
) -> Plan:
    """What `inject(model, config)` would adapt, and what training it would hold. Changes nothing.

    Works on a model without weights (meta device) too. `memory` is the peak of a training step
    on one batch of `batch_size` x `tokens` (at most the model's context), its last share
    `supervised` targets, `padded` (rows of several lengths) or full, or `packed`, with `logits` of
    the last so many positions of each row (those of the targets by default), with AdamW, whose two
    moments have the trained parameters' dtype; with gradient `checkpointing` or without, with
    `autocast` to bfloat16 or without, by `fused` kernels or plain ones. Over several forward
    passes a step (accumulation) it is higher by at most the gradients. Without `activations` these
    are not reckoned, which takes most of the time. `gpu_bytes` is the memory of a GPU whose share
    is told. `flops` has arithmetic a token at that context (`sidepath.store.flops`).
    Held against the bytes of real steps on CPU it is within 15 % (`tests/store/test_memory.py`).
    Raises what `inject` would raise.
    """
    sites = resolve(model, config)
    context = _context(model)
    tokens = min(tokens, (context or tokens + config.positions) - config.positions)
    twin = Twin(model, config, sites)
    installed = twin.installed
    base = [parameter for _, parameter in base_parameters(model)]
    shape = Shape(batch_size, tokens, supervised, padded, autocast, logits, packed, fused)
    return Plan(
        method=config.method,
        trainable=sum(parameter.numel() for parameter in installed.parameters()),
        total=sum(map(_numbers, base)),
        adapter_bytes=file_bytes(installed, dict(modules_of(model))),
        sites=tuple(sites),
        memory=twin.memory(shape, checkpointing=checkpointing, activations=activations),
        batch_size=batch_size,
        tokens=tokens,
        dtypes=(_dtypes(base), _dtypes(installed.parameters())),
        positions=config.positions,
        context=context,
        flops=flops(model, installed, tokens),
        gpu_bytes=gpu_bytes,
    )


def file_bytes(installed: Installed, modules: Mapping[str, nn.Module]) -> int:
    """Size of an adapter's safetensors file: eight bytes, its header and its tensors."""
    slots = slots_of(installed, modules)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    tensors = {slot: installed.deltas[slot.path].tensors()[slot.local] for slot in slots}
    # The library writes wide numbers first, and those of one width by name.
    for slot in sorted(slots, key=lambda slot: (-tensors[slot].element_size(), slot.key)):
        tensor = tensors[slot]
        end = offset + torch.Size(slot.shape).numel() * tensor.element_size()
        dtype = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
        header[slot.key] = {
            "dtype": dtype,
            "shape": list(slot.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-text // 8) * 8 + offset


def readable(size: int) -> str:
    """A number of bytes as people read it: `8.4 MiB`."""
    if size < 1024:
        return f"{size} B"
    value = float(size)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if value < 1024 or unit == "TiB":
            break
    return f"{value:.1f} {unit}"


def _told(found: Flops) -> str:
    """The arithmetic of a token in one line."""
    merged = "" if found.serving_merged is None else f", merged {_short(found.serving_merged)}"
    ratio = found.training / max(1, found.training_full)
    return (
        f"{_short(found.training)}FLOP a token of training ({ratio:.2f} of training everything), "
        f"{_short(found.serving)}FLOP of serving{merged}, at {found.context} tokens of context"
    )


def _short(count: float) -> str:
    """A large number as people read it: `1.05 T`."""
    power = min(5, (len(str(int(count))) - 1) // 3)
    return f"{count / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P')[power]}"


def _other(memory: Memory) -> str:
    """What the activations would be the other way: with checkpointing, or without."""
    plain, checkpointed = memory.activations_plain, memory.activations_checkpointed
    if plain is None or checkpointed is None:
        return ""
    if memory.activations == plain:
        return f" ({readable(checkpointed)} with gradient checkpointing)"
    return f" ({readable(plain)} without gradient checkpointing)"


def _numbers(parameter: Tensor) -> int:
    """How many numbers a parameter stands for; a packed one holds two a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def _context(model: nn.Module) -> int | None:
    """The longest row the model's positions allow, where its config says."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _dtypes(parameters: Iterable[Tensor]) -> str:
    names = {_dtype_name(parameter) for parameter in parameters}
    return ", ".join(sorted(names)) or "none"


def _dtype_name(parameter: Tensor) -> str:
    """The dtype, or the kind of 4-bit codes that a packed parameter holds."""
    packed = state_of(parameter)
    return str(parameter.dtype).removeprefix("torch.") if packed is None else packed.quant_type
