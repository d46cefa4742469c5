"""Random models of the figures' shapes; nothing is ever downloaded.

Dimensions: B rows, T tokens.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sidepath.data.example import Example
from sidepath.training.batching import Batch, collate

Shape = Literal["llama", "gpt2", "linears", "llama-7b"]
DType = Literal["float32", "bfloat16"]

SHAPES: dict[Shape, dict[str, Any]] = {
    "llama": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 32_000,
        "tie_word_embeddings": True,
    },
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50_257},
    "linears": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 32,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 256,
        "tie_word_embeddings": True,
    },
    "llama-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32_000,
    },
}
"""A Llama of 100M parameters; GPT-2 small, 124M; a Llama of 224 linear layers, whose adapter of
rank 8 is a file of 10 MB; Llama 2's 6.7 billion, for GPUs (`benchmarks/gpu.py`)."""

TINY: dict[Shape, dict[str, Any]] = {
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64},
    "linears": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    },
}
TINY["llama-7b"] = TINY["llama"]
"""The same, tiny: what `--quick` runs."""


def config_of(shape: Shape, *, quick: bool = False) -> Any:
    """The transformers config of a shape. GPT-2's dropout is off: all ways compute the same."""
    from transformers import GPT2Config, LlamaConfig

    settings = {**SHAPES[shape], **(TINY[shape] if quick else {})}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if shape == "gpt2":
        off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return GPT2Config(**settings, **special, **off)
    return LlamaConfig(**settings, **special, max_position_embeddings=2048)


def make(shape: Shape, dtype: DType, device: torch.device, *, quick: bool = False) -> nn.Module:
    """A random model, the same at each call: transformers' class, in training mode, frozen."""
    from transformers import AutoModelForCausalLM

    config = config_of(shape, quick=quick)
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus), device:  # made where it is to be: 7B is slow on a CPU
        torch.manual_seed(0)
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.to(device).train().requires_grad_(False)


def vocabulary(model: nn.Module) -> int:
    """How many tokens a model knows."""
    config: Any = model.config
    return int(config.vocab_size)


def token_ids(model: nn.Module, rows: int, tokens: int, seed: int = 0) -> Tensor:
    """Random ids (B, T) on the model's device, the same at each call, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(3, vocabulary(model), (rows, tokens), generator=generator)
    return ids_BT.to(next(model.parameters()).device)


def batch_of(ids_BT: Tensor) -> Batch:
    """The batch that training makes of these rows when every token is supervised."""
    rows = ids_BT.cpu().numpy()
    supervised_T = np.ones(rows.shape[1], dtype=np.bool_)
    examples = [Example(row, supervised_T, line) for line, row in enumerate(rows, start=1)]
    return collate(examples, range(len(examples)), pad_id=0).to(ids_BT.device)
