"""A model in two: its body, and the head above it.

A causal model's loss comes from its body's hidden states without the logits of all of them; and a
body in which nothing is trained is a fixed function of its input.

Dimensions: B rows, T tokens, K positions kept, N targets, D features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sidepath.core.adapted import CHILD
from sidepath.core.blocks import MODELS
from sidepath.core.fused import all_watched, watched
from sidepath.core.quant import qualified
from sidepath.errors import UnsupportedModule
from sidepath.injection.body import body_path
from sidepath.injection.registry import registry_of
from sidepath.kernels.head import head_loss

BODIES: dict[str, str] = {
    f"{MODELS}llama.modeling_llama.LlamaForCausalLM": "model",
    f"{MODELS}mistral.modeling_mistral.MistralForCausalLM": "model",
    f"{MODELS}qwen2.modeling_qwen2.Qwen2ForCausalLM": "model",
    f"{MODELS}qwen3.modeling_qwen3.Qwen3ForCausalLM": "model",
    f"{MODELS}smollm3.modeling_smollm3.SmolLM3ForCausalLM": "model",
    f"{MODELS}gemma.modeling_gemma.GemmaForCausalLM": "model",
    f"{MODELS}olmo2.modeling_olmo2.Olmo2ForCausalLM": "model",
    f"{MODELS}phi.modeling_phi.PhiForCausalLM": "model",
    f"{MODELS}gpt2.modeling_gpt2.GPT2LMHeadModel": "transformer",
}
"""Models whose logits are their head's product of the body's output and nothing more."""


@dataclass(frozen=True)
class Head:
    """A causal model in two: its body, and the frozen layer that makes logits."""

    body: nn.Module
    layer: nn.Linear

    def hidden(self, **inputs: Any) -> Tensor:
        """(B, T, D): what the head sees, for the inputs that the model takes."""
        hidden_BTD: Tensor = self.body(**inputs).last_hidden_state
        return hidden_BTD

    def loss(self, hidden_ND: Tensor, targets_N: Tensor, smoothing: float = 0.0) -> Tensor:
        """The summed cross-entropy of rows of hidden states, in nats."""
        layer = self.layer
        return head_loss(hidden_ND, layer.weight, layer.bias, targets_N, smoothing=smoothing)


def frozen_body(model: nn.Module, places: Iterable[str]) -> nn.Module | None:
    """The body of a model if what is trained, at these dotted names, all stands above it; else, and
    where no one module is called for a row, None.
    """
    try:
        path = body_path(model)
    except UnsupportedModule:
        return None
    inside = any(f"{place}.".startswith(f"{path}.") for place in places)
    return None if inside else model.get_submodule(path)


def fused_head(model: nn.Module) -> Head | None:
    """The two parts of a model that an adapter trains, or None where its own way must be gone:
    no fused kernels wanted, a model that is not in the table, somebody who waits for the call of
    the model or its head, or a head that is trained or adapted.
    """
    registry = registry_of(model)
    name = BODIES.get(qualified(type(model)))
    if (
        registry is None
        or name is None
        or not registry.routing.fused
        or _compiled_or_autocast(model)
    ):
        return None
    body, layer = model.get_submodule(name), model.get_output_embeddings()  # type: ignore[operator]
    plain = type(layer) is nn.Linear and CHILD not in layer._modules
    if not plain or all_watched():
        return None
    if any("forward" in module.__dict__ or watched(module) for module in (model, layer)):
        return None
    trained = any(parameter.requires_grad for parameter in layer.parameters())
    return None if trained else Head(body, layer)


def _compiled_or_autocast(model: nn.Module) -> bool:
    device = next(model.parameters()).device.type
    return torch.compiler.is_compiling() or torch.is_autocast_enabled(device)
