"""Blocks of known shape that are computed in one piece while they are trained.

As with side paths the module stays and its class is swapped in place. The fused forward acts
only where gradients are recorded and one adapter answers; everywhere else, and for whatever it
does not know, the module's own forward pass runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from sidepath.core.adapted import CHILD, SidePaths
from sidepath.core.quant import qualified
from sidepath.core.routing import Routing
from sidepath.core.views import LinearView, view_of
from sidepath.kernels import activations
from sidepath.kernels.activations import Activation
from sidepath.kernels.linear import Layer
from sidepath.kernels.mlp import gated_mlp, plain_mlp
from sidepath.kernels.norm import rms_norm

ACTIVATIONS: dict[str, Activation] = {
    "torch.nn.modules.activation.SiLU": activations.SILU,
    "transformers.activations.SiLUActivation": activations.SILU,
    "transformers.activations.GELUActivation": activations.GELU,
    "transformers.activations.GELUTanh": activations.GELU_TANH,
    "transformers.activations.NewGELUActivation": activations.GELU_NEW,
}
"""Element-wise functions whose derivative is known, by the class that computes them."""

_BLOCK = "_sidepath_block"


class Block(ABC):
    """How one module is computed in one piece."""

    def __init__(self, module: nn.Module, routing: Routing) -> None:
        self.module = module
        self.base_class = type(module)
        self.routing = routing

    def wanted(self, x: Tensor) -> bool:
        """Whether the fused pass may act on this input now."""
        routing = self.routing
        return (
            routing.fused
            and routing.active is not None
            and not routing.silent
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled(x.device.type)
        )

    @abstractmethod
    def fused(self, x: Tensor) -> Tensor | None:
        """The module's output, or None where its own forward pass has to run."""


class Norm(Block):
    """`weight * x / rms(x)`, as Llama's and its relatives' RMSNorm compute it."""

    def fused(self, x: Tensor) -> Tensor | None:
        weight = self.module._parameters["weight"]
        frozen = weight is not None and not weight.requires_grad and weight.dtype == x.dtype
        if not (frozen and x.requires_grad) or x.dtype == torch.float64:
            return None
        return rms_norm(x, weight, self.module.variance_epsilon)  # type: ignore[arg-type]


class _Linears(Block):
    """A block of linear layers with an activation between them."""

    layers: tuple[str, ...]
    activation: str

    def __init__(self, module: nn.Module, routing: Routing) -> None:
        super().__init__(module, routing)
        self.views = {name: view_of(module.get_submodule(name)) for name in self.layers}
        self.act = ACTIVATIONS.get(qualified(type(module.get_submodule(self.activation))))

    def _layers(self) -> list[Layer] | None:
        """The block's linear layers with their side paths, where all are frozen and plain."""
        found = []
        for name, view in self.views.items():
            module = self.module._modules.get(name)
            if view is None or module is not view.module or _watched(module):
                return None
            layer = _layer(view, self.routing.active) if isinstance(view, LinearView) else None
            if layer is None:
                return None
            found.append(layer)
        return found


class GatedMLP(_Linears):
    """`down(act(gate(x)) * up(x))`: Llama and its relatives."""

    layers = ("gate_proj", "up_proj", "down_proj")
    activation = "act_fn"

    def fused(self, x: Tensor) -> Tensor | None:
        layers = self._layers()
        return None if layers is None or self.act is None else gated_mlp(x, *layers, self.act)


class PlainMLP(_Linears):
    """`dropout(c_proj(act(c_fc(x))))`: GPT-2."""

    layers = ("c_fc", "c_proj")
    activation = "act"

    def fused(self, x: Tensor) -> Tensor | None:
        layers = self._layers()
        if layers is None or self.act is None:
            return None
        y: Tensor = self.module.dropout(plain_mlp(x, *layers, self.act))  # type: ignore[operator]
        return y


class PhiMLP(PlainMLP):
    """`fc2(activation_fn(fc1(x)))`: Phi."""

    layers = ("fc1", "fc2")
    activation = "activation_fn"

    def fused(self, x: Tensor) -> Tensor | None:
        layers = self._layers()
        return None if layers is None or self.act is None else plain_mlp(x, *layers, self.act)


_MODELS = "transformers.models."
BLOCKS: dict[str, type[Block]] = {
    f"{_MODELS}llama.modeling_llama.LlamaRMSNorm": Norm,
    f"{_MODELS}mistral.modeling_mistral.MistralRMSNorm": Norm,
    f"{_MODELS}qwen2.modeling_qwen2.Qwen2RMSNorm": Norm,
    f"{_MODELS}qwen3.modeling_qwen3.Qwen3RMSNorm": Norm,
    f"{_MODELS}smollm3.modeling_smollm3.SmolLM3RMSNorm": Norm,
    f"{_MODELS}llama.modeling_llama.LlamaMLP": GatedMLP,
    f"{_MODELS}mistral.modeling_mistral.MistralMLP": GatedMLP,
    f"{_MODELS}qwen2.modeling_qwen2.Qwen2MLP": GatedMLP,
    f"{_MODELS}qwen3.modeling_qwen3.Qwen3MLP": GatedMLP,
    f"{_MODELS}smollm3.modeling_smollm3.SmolLM3MLP": GatedMLP,
    f"{_MODELS}olmo2.modeling_olmo2.Olmo2MLP": GatedMLP,
    f"{_MODELS}gemma.modeling_gemma.GemmaMLP": GatedMLP,
    f"{_MODELS}gpt2.modeling_gpt2.GPT2MLP": PlainMLP,
    f"{_MODELS}phi.modeling_phi.PhiMLP": PhiMLP,
}
"""Which module is computed how; exactly these classes, none that inherits from one."""


class FusedBlock(nn.Module):
    """Mixed in before a module's own class: one piece where that is possible."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        block: Block = self.__dict__[_BLOCK]
        if not (args or kwargs) and block.wanted(x):
            y = block.fused(x)
            if y is not None:
                return y
        result: Tensor = block.base_class.forward(self, x, *args, **kwargs)
        return result


_fused_classes: dict[type[nn.Module], type[nn.Module]] = {}


def fuse(module: nn.Module, routing: Routing) -> bool:
    """Let a module of a known class be computed in one piece. In place; False for any other."""
    kind = BLOCKS.get(qualified(type(module)))
    if kind is None or "forward" in module.__dict__:
        return False
    cls = type(module)
    if cls not in _fused_classes:
        _fused_classes[cls] = type(cls.__name__, (FusedBlock, cls), {"__module__": cls.__module__})
    module.__dict__[_BLOCK] = kind(module, routing)
    module.__class__ = _fused_classes[cls]
    return True


def unfuse(module: nn.Module) -> None:
    """Give a module back its own class, where `fuse` took it. In place."""
    block = module.__dict__.pop(_BLOCK, None)
    if isinstance(block, Block):
        module.__class__ = block.base_class


def _watched(module: nn.Module) -> bool:
    """Whether somebody waits for this module's own call, which a fused pass would leave out."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _layer(view: LinearView, active: str | None) -> Layer | None:
    side = view.module._modules.get(CHILD)
    delta = side.get(active) if isinstance(side, SidePaths) and active is not None else None
    if delta is not None:
        return None if delta.drops else delta.layer(view)
    return Layer(view) if view.frozen else None
