"""What an adapter would be, before anything is made: places, parameters, bytes, memory.

The plan is read off a twin of the model on the meta device, which has every shape and no
memory: the adapter is really put in there, and a forward pass really counted.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sidepath.core.adapted import CHILD
from sidepath.injection.architecture import modules_of
from sidepath.injection.registry import Installed, base_parameters, registry_of
from sidepath.injection.surgery import activate, put_in, remove
from sidepath.injection.targets import resolve
from sidepath.methods.base import Method, Site
from sidepath.methods.lora import LoRA
from sidepath.store.peft_format import slots_of

_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


@dataclass(frozen=True)
class Memory:
    """Bytes one training step holds, by part; activations are unknown (None) for models that
    a forward pass of token ids alone does not run.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int | None

    @property
    def total(self) -> int:
        """The sum of the known parts."""
        return self.weights + self.gradients + self.optimizer + (self.activations or 0)

    def as_dict(self) -> dict[str, int | None]:
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "total": self.total,
        }


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
        memory = self.memory
        activations = "unknown" if memory.activations is None else readable(memory.activations)
        lines.append(
            f"memory       {readable(memory.total)} for a step of {self.batch_size} x {self.tokens}"
            f" tokens: weights {readable(memory.weights)}, gradients {readable(memory.gradients)}, "
            f"optimizer {readable(memory.optimizer)}, activations {activations}"
        )
        return "\n".join(lines)


def plan(model: nn.Module, config: Method, *, batch_size: int = 8, tokens: int = 128) -> Plan:
    """What `inject(model, config)` would adapt, and what training it would hold. Changes nothing.

    Works on a model without weights (meta device) too. The optimizer is AdamW: two moments in
    the trained parameters' dtype. Activations are the tensors that autograd keeps for the
    backward pass of one batch of `batch_size` x `tokens` (at most the model's context), counted,
    the loss included.
    Raises what `inject` would raise.
    """
    sites = resolve(model, config)
    tokens = min(tokens, _context(model) or tokens)
    twin = _weightless(model)
    with torch.random.fork_rng(devices=[]):
        installed = put_in(twin, config, "plan", sites)
    activate(twin, "plan")
    trained = sum(parameter.nbytes for parameter in installed.parameters())
    base = [parameter for _, parameter in base_parameters(model)]
    weights = sum(parameter.nbytes for parameter in base) + trained
    kept = _bytes_for_backward(twin, batch_size, tokens)
    return Plan(
        method=config.method,
        trainable=sum(parameter.numel() for parameter in installed.parameters()),
        total=sum(parameter.numel() for parameter in base),
        adapter_bytes=file_bytes(installed, dict(modules_of(model))),
        sites=tuple(sites),
        memory=Memory(weights, trained, 2 * trained, kept),
        batch_size=batch_size,
        tokens=tokens,
        dtypes=(_dtypes(base), _dtypes(installed.parameters())),
    )


def file_bytes(installed: Installed, modules: Mapping[str, nn.Module]) -> int:
    """Size of an adapter's safetensors file: eight bytes, its header and its tensors."""
    assert isinstance(installed.config, LoRA)
    slots, _ = slots_of(modules, installed.config, installed.sites.values())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for slot in slots:
        tensor = installed.deltas[slot.path].tensors()[slot.local]
        end = offset + torch.Size(slot.shape).numel() * tensor.element_size()
        dtype = _SAFETENSORS_DTYPES.get(tensor.dtype, str(tensor.dtype))
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


def _weightless(model: nn.Module) -> nn.Module:
    """A deep copy of the model whose tensors are on the meta device; without its adapters."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                empty = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
                memo[id(parameter)] = empty
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in memo:
                memo[id(buffer)] = buffer.detach().to("meta")
    twin = copy.deepcopy(model, memo)
    registry = registry_of(twin)
    for name in list(registry.adapters) if registry is not None else ():
        remove(twin, name)
    assert not any(CHILD in path.split(".") for path, _ in twin.named_modules())
    return twin


def _bytes_for_backward(model: nn.Module, batch_size: int, tokens: int) -> int | None:
    """Bytes autograd keeps for one batch, each storage once, parameters left out."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own:
            kept[storage] = tensor
        return tensor

    ids_BT = torch.zeros(batch_size, tokens, dtype=torch.long, device="meta")
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model.train()(input_ids=ids_BT).logits.flatten(0, -2)
            targets = torch.zeros(len(logits), dtype=torch.long, device="meta")
            nn.functional.cross_entropy(logits.float(), targets)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
        return None  # not a model of token ids, or one whose forward reads values
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _context(model: nn.Module) -> int | None:
    """The longest row the model's positions allow, where its config says."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _dtypes(parameters: Iterable[Tensor]) -> str:
    names = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})
    return ", ".join(names) or "none"
