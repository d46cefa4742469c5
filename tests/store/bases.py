"""The papers' bases by their numbers: modules without weights, from transformers' configs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers
from torch import nn


def _gpt2(width: int, layers: int, heads: int, context: int = 1024) -> Callable[[], Any]:
    numbers = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": context}
    return lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**numbers))


def _bert(kind: str, width: int, layers: int, model: str = "Model", **more: Any) -> Any:
    numbers: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
    }
    if kind == "Roberta":
        numbers |= {
            "vocab_size": 50265,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
            "pad_token_id": 1,
        }
    options = {} if model != "Model" else {"add_pooling_layer": more.pop("pooler", True)}
    numbers |= more
    config = getattr(transformers, f"{kind}Config")(**numbers)
    return lambda: getattr(transformers, f"{kind}{model}")(config, **options)


def _deberta(model: str = "Model", **more: Any) -> Callable[[], Any]:
    config = transformers.DebertaV2Config(
        hidden_size=1536,
        num_hidden_layers=48,
        num_attention_heads=24,
        intermediate_size=6144,
        vocab_size=128100,
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        max_position_embeddings=512,
        conv_kernel_size=3,
        conv_act="gelu",
        **more,
    )
    return lambda: getattr(transformers, f"DebertaV2{model}")(config)


def _llama(width: int, layers: int, inner: int, heads: int, **more: Any) -> Callable[[], Any]:
    config = transformers.LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=inner,
        num_attention_heads=heads,
        **more,
    )
    return lambda: transformers.LlamaForCausalLM(config)


def _opt_175b() -> Any:
    config = transformers.OPTConfig(
        hidden_size=12288, num_hidden_layers=96, num_attention_heads=96, ffn_dim=49152,
        word_embed_proj_dim=12288, max_position_embeddings=2048,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def _t5_xxl() -> Any:
    config = transformers.T5Config(
        d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, vocab_size=32128,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 200), nn.Linear(200, 200), nn.Linear(200, 10))


def _lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5), nn.Linear(256, 120), nn.Linear(120, 84),
        nn.Linear(84, 10),
    )  # fmt: skip


MNLI: dict[str, Any] = {"model": "ForSequenceClassification", "num_labels": 3}
LLAMA3 = {"vocab_size": 128256, "num_key_value_heads": 8}
BASES: dict[str, Callable[[], Any]] = {
    "gpt3-175b": _gpt2(12288, 96, 96, context=2048),
    "gpt3-175b, q and v apart": _opt_175b,
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "roberta-base": _bert("Roberta", 768, 12),
    "roberta-base without pooler": _bert("Roberta", 768, 12, pooler=False),
    "roberta-base+MNLI": _bert("Roberta", 768, 12, **MNLI),
    "roberta-large": _bert("Roberta", 1024, 24),
    "roberta-large+MNLI": _bert("Roberta", 1024, 24, **MNLI),
    "bert-base": _bert("Bert", 768, 12),
    "bert-large": _bert("Bert", 1024, 24),
    "deberta-xxl": _deberta(),
    "deberta-xxl+MNLI": _deberta(**MNLI),
    "llama-7b": _llama(4096, 32, 11008, 32),
    "llama-13b": _llama(5120, 40, 13824, 40),
    "llama-3.1-8b": _llama(4096, 32, 14336, 32, **LLAMA3),
    "llama-3.2-3b": _llama(3072, 28, 8192, 24, head_dim=128, tie_word_embeddings=True, **LLAMA3),
    "t5-xxl": _t5_xxl,
    "MNIST FC": _perceptron,
    "MNIST LeNet": _lenet,
}
"""By name. The `MNIST` ones are the networks of Li et al., 2018, in their layers alone."""


@cache
def base(name: str) -> Any:
    """The base of that name on the meta device; plans change nothing, so that it is shared."""
    with torch.device("meta"):
        model = BASES[name]()
    return model.eval()


@cache
def size(name: str) -> int:
    """Parameters of the base, tied ones once."""
    return sum(parameter.numel() for parameter in base(name).parameters())
