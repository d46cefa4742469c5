"""Blocks of known shape that are computed in one piece while they are trained, and their table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sidepath.core.fused import BLOCK, Block, Linears, watched
from sidepath.core.quant import qualified
from sidepath.core.routing import Routing
from sidepath.core.siblings import Projections
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


class Norm(Block):
    """`weight * x / rms(x)`, as Llama's and its relatives' RMSNorm compute it."""

    def wanted(self, x: Tensor) -> bool:
        return x.requires_grad and x.dtype != torch.float64 and super().wanted(x)

    def fused(self, x: Tensor) -> Tensor | None:
        weight = self.module._parameters["weight"]
        if weight is None or weight.requires_grad or weight.dtype != x.dtype:
            return None
        return rms_norm(x, weight, self.module.variance_epsilon)  # type: ignore[arg-type]


class _MLP(Linears):
    """Linear layers with an activation between them."""

    activation: str

    def __init__(self, module: nn.Module, routing: Routing) -> None:
        super().__init__(module, routing)
        self.act_module = module.get_submodule(self.activation)
        self.act = ACTIVATIONS.get(qualified(type(self.act_module)))

    def layers(self) -> list[Layer] | None:
        act = self.module._modules.get(self.activation)
        if self.act is None or act is not self.act_module or watched(act):
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


MODELS = "transformers.models."
"""Where transformers keeps the classes of its models."""
BLOCKS: dict[str, type[Block]] = {
    f"{MODELS}llama.modeling_llama.LlamaRMSNorm": Norm,
    f"{MODELS}mistral.modeling_mistral.MistralRMSNorm": Norm,
    f"{MODELS}qwen2.modeling_qwen2.Qwen2RMSNorm": Norm,
    f"{MODELS}qwen3.modeling_qwen3.Qwen3RMSNorm": Norm,
    f"{MODELS}smollm3.modeling_smollm3.SmolLM3RMSNorm": Norm,
    f"{MODELS}llama.modeling_llama.LlamaMLP": GatedMLP,
    f"{MODELS}mistral.modeling_mistral.MistralMLP": GatedMLP,
    f"{MODELS}qwen2.modeling_qwen2.Qwen2MLP": GatedMLP,
    f"{MODELS}qwen3.modeling_qwen3.Qwen3MLP": GatedMLP,
    f"{MODELS}smollm3.modeling_smollm3.SmolLM3MLP": GatedMLP,
    f"{MODELS}olmo2.modeling_olmo2.Olmo2MLP": GatedMLP,
    f"{MODELS}gemma.modeling_gemma.GemmaMLP": GatedMLP,
    f"{MODELS}gpt2.modeling_gpt2.GPT2MLP": GPT2MLP,
    f"{MODELS}phi.modeling_phi.PhiMLP": PhiMLP,
    f"{MODELS}llama.modeling_llama.LlamaAttention": Projections,
    f"{MODELS}mistral.modeling_mistral.MistralAttention": Projections,
    f"{MODELS}qwen2.modeling_qwen2.Qwen2Attention": Projections,
    f"{MODELS}qwen3.modeling_qwen3.Qwen3Attention": Projections,
    f"{MODELS}smollm3.modeling_smollm3.SmolLM3Attention": Projections,
    f"{MODELS}gemma.modeling_gemma.GemmaAttention": Projections,
    f"{MODELS}olmo2.modeling_olmo2.Olmo2Attention": Projections,
    f"{MODELS}phi.modeling_phi.PhiAttention": Projections,
}
"""Which module is computed how; exactly these classes, none that inherits from one."""


def fuse(module: nn.Module, routing: Routing) -> bool:
    """Let a module of a known class be computed in one piece. In place; False for any other."""
    kind = BLOCKS.get(qualified(type(module)))
    if kind is None or "forward" in module.__dict__:
        return False
    kind(module, routing).take()
    return True


def unfuse(module: nn.Module) -> None:
    """The inverse of `fuse`; nothing happens to a module that it left alone. In place."""
    block = module.__dict__.get(BLOCK)
    if isinstance(block, Block):
        block.give_back()
