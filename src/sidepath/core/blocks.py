"""Blocks of known shape that are computed in one piece while they are trained.

As with side paths the module stays and its class is swapped in place. The fused forward acts
only where gradients are recorded and one adapter answers; everywhere else, and for whatever it
does not know, the module's own forward pass runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sidepath.core.adapted import CHILD, SIBLINGS, SidePaths
from sidepath.core.delta import Delta
from sidepath.core.quant import qualified
from sidepath.core.routing import Routing
from sidepath.core.views import LinearView, View, view_of
from sidepath.kernels import activations
from sidepath.kernels.activations import Activation
from sidepath.kernels.linear import Layer, SidePathLinears
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


class Block:
    """How one module of a known class is computed in one piece."""

    def __init__(self, module: nn.Module, routing: Routing) -> None:
        self.module = module
        self.base_class = type(module)
        self.routing = routing

    def wanted(self, x: Tensor) -> bool:
        """Whether the fused pass may act on this input now."""
        routing = self.routing
        return (
            routing.fused
            and (routing.active is not None or routing.rows is not None)
            and not routing.silent
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled(x.device.type)
        )

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's forward gives: in one piece where that is possible."""
        if len(args) == 1 and not kwargs and self.wanted(args[0]):
            y = self.fused(args[0])
            if y is not None:
                return y
        return self.base_class.forward(self.module, *args, **kwargs)

    def fused(self, x: Tensor) -> Tensor | None:
        """The module's output, or None where its own forward pass has to run."""
        raise NotImplementedError

    def take(self) -> None:
        """Let the module be computed so. In place."""
        module, cls = self.module, self.base_class
        if cls not in _fused_classes:
            made = type(cls.__name__, (FusedBlock, cls), {"__module__": cls.__module__})
            _fused_classes[cls] = made
        module.__dict__[_BLOCK] = self
        module.__class__ = _fused_classes[cls]

    def give_back(self) -> None:
        """The inverse of `take`. In place."""
        del self.module.__dict__[_BLOCK]
        self.module.__class__ = self.base_class


class Norm(Block):
    """`weight * x / rms(x)`, as Llama's and its relatives' RMSNorm compute it."""

    def wanted(self, x: Tensor) -> bool:
        return x.requires_grad and x.dtype != torch.float64 and super().wanted(x)

    def fused(self, x: Tensor) -> Tensor | None:
        weight = self.module._parameters["weight"]
        if weight is None or weight.requires_grad or weight.dtype != x.dtype:
            return None
        return rms_norm(x, weight, self.module.variance_epsilon)  # type: ignore[arg-type]


class _Linears(Block):
    """A block with linear layers in it."""

    names: tuple[str, ...]

    def __init__(self, module: nn.Module, routing: Routing) -> None:
        super().__init__(module, routing)
        self.views = [_view(module.get_submodule(name)) for name in self.names]

    def layers(self) -> list[Layer] | None:
        """The linear layers with their side paths, where all are frozen and plain."""
        if self.routing.rows is not None:
            return None  # each row has side paths of its own
        found = []
        for name, view in zip(self.names, self.views, strict=True):
            module = self.module._modules.get(name)
            if not isinstance(view, LinearView) or module is not view.module or _watched(module):
                return None
            layer = self._layer(view)
            if layer is None:
                return None
            found.append(layer)
        return found

    def _layer(self, view: LinearView) -> Layer | None:
        side = view.module._modules.get(CHILD)
        delta = None if side is None else side._modules.get(self.routing.key)
        if delta is None:
            return view.layer()
        assert isinstance(delta, Delta)
        factors = delta.factors()
        return None if factors is None else view.layer(*factors)


def _view(module: nn.Module) -> View | None:
    """The module as it was before side paths stood beside it, which they may do already."""
    side = module._modules.get(CHILD)
    return side.view if isinstance(side, SidePaths) else view_of(module)


class _MLP(_Linears):
    """Linear layers with an activation between them."""

    activation: str

    def __init__(self, module: nn.Module, routing: Routing) -> None:
        super().__init__(module, routing)
        self.act_module = module.get_submodule(self.activation)
        self.act = ACTIVATIONS.get(qualified(type(self.act_module)))

    def layers(self) -> list[Layer] | None:
        act = self.module._modules.get(self.activation)
        if self.act is None or act is not self.act_module or _watched(act):
            return None
        return super().layers()

    def fused(self, x: Tensor) -> Tensor | None:
        layers, act = self.layers(), self.act
        if layers is None or act is None:
            return None
        if len(layers) == 2:
            return plain_mlp(x, layers[0], layers[1], act)
        return gated_mlp(x, layers[0], layers[1], layers[2], act)


class GatedMLP(_MLP):
    """`down(act(gate(x)) * up(x))`: Llama and its relatives."""

    names = ("gate_proj", "up_proj", "down_proj")
    activation = "act_fn"


class PhiMLP(_MLP):
    """`fc2(activation_fn(fc1(x)))`: Phi."""

    names = ("fc1", "fc2")
    activation = "activation_fn"


class GPT2MLP(PhiMLP):
    """`dropout(c_proj(act(c_fc(x))))`: GPT-2."""

    names = ("c_fc", "c_proj")
    activation = "act"

    def fused(self, x: Tensor) -> Tensor | None:
        y = super().fused(x)
        return None if y is None else self.module.dropout(y)  # type: ignore[operator]


class Projections(_Linears):
    """Queries, keys and values: three layers that are called one after another on one input.

    The first one called computes all three, the others take what is there for them. Only while
    their module runs: nothing stays behind it, and who asks one of them alone is told of it alone.
    """

    names = ("q_proj", "k_proj", "v_proj")

    def __init__(self, module: nn.Module, routing: Routing) -> None:
        super().__init__(module, routing)
        self._running = False
        self._seen: Tensor | None = None
        self._ready: dict[nn.Module, Tensor] = {}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.base_class.forward(self.module, *args, **kwargs)
        self._running = True
        try:
            return self.base_class.forward(self.module, *args, **kwargs)
        finally:
            self._running, self._seen, self._ready = False, None, {}

    def answer(self, asked: nn.Module, x: Tensor) -> Tensor | None:
        """What `asked` makes of `x`, or None where it is to be computed by itself."""
        if self._seen is x and asked in self._ready:
            y = self._ready.pop(asked)
            if not self._ready:
                self._seen = None
            return y
        self._seen, self._ready = None, {}
        if not self._running or asked is not self.module._modules[self.names[0]]:
            return None
        layers = self.layers()
        if layers is None or any(layer.A_RI is None for layer in layers):
            return None
        factors = [tensor for layer in layers for tensor in (layer.A_RI, layer.B_OR)]
        ys = SidePathLinears.apply(x, layers, None, *factors)  # type: ignore[no-untyped-call]
        members = [self.module._modules[name] for name in self.names[1:]]
        self._seen = x
        self._ready = {m: y for m, y in zip(members, ys[1:], strict=True) if m is not None}
        return ys[0]  # type: ignore[no-any-return]

    def take(self) -> None:
        super().take()
        for name in self.names:
            self.module.get_submodule(name).__dict__[SIBLINGS] = self

    def give_back(self) -> None:
        super().give_back()
        for name in self.names:
            del self.module.get_submodule(name).__dict__[SIBLINGS]


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
    f"{_MODELS}gpt2.modeling_gpt2.GPT2MLP": GPT2MLP,
    f"{_MODELS}phi.modeling_phi.PhiMLP": PhiMLP,
    f"{_MODELS}llama.modeling_llama.LlamaAttention": Projections,
    f"{_MODELS}mistral.modeling_mistral.MistralAttention": Projections,
    f"{_MODELS}qwen2.modeling_qwen2.Qwen2Attention": Projections,
    f"{_MODELS}qwen3.modeling_qwen3.Qwen3Attention": Projections,
    f"{_MODELS}smollm3.modeling_smollm3.SmolLM3Attention": Projections,
    f"{_MODELS}gemma.modeling_gemma.GemmaAttention": Projections,
    f"{_MODELS}olmo2.modeling_olmo2.Olmo2Attention": Projections,
    f"{_MODELS}phi.modeling_phi.PhiAttention": Projections,
}
"""Which module is computed how; exactly these classes, none that inherits from one."""


class FusedBlock(nn.Module):
    """Mixed in before a module's own class: one piece where that is possible."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        block: Block = self.__dict__[_BLOCK]
        return block.run(*args, **kwargs)


_fused_classes: dict[type[nn.Module], type[nn.Module]] = {}


def fuse(module: nn.Module, routing: Routing) -> bool:
    """Let a module of a known class be computed in one piece. In place; False for any other."""
    kind = BLOCKS.get(qualified(type(module)))
    if kind is None or "forward" in module.__dict__:
        return False
    kind(module, routing).take()
    return True


def unfuse(module: nn.Module) -> None:
    """The inverse of `fuse`; nothing happens to a module that it left alone. In place."""
    block = module.__dict__.get(_BLOCK)
    if isinstance(block, Block):
        block.give_back()


def _watched(module: nn.Module) -> bool:
    """Whether somebody waits for this module's own call, which a fused pass would leave out."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
