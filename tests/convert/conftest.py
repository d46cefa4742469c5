"""A tiny Llama with an untied head, biases in its attention, on disk."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sidepath.convert.portable import Base

from .made import save_base


def biased_llama() -> Any:
    """Two blocks, grouped queries, a bias on every attention matrix."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=128,
        attention_bias=True,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.2)
    return model


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The base on disk; nothing changes it."""
    return save_base(biased_llama(), tmp_path_factory.mktemp("bases") / "llama")
