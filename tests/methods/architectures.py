"""Tiny random models of every kind of transformer there is, with an input for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _causal(family: str, **more: Any) -> Callable[[], Any]:
    def make() -> nn.Module:
        torch.manual_seed(7)
        config = getattr(transformers, f"{family}Config")(**SIZES | more)
        model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config)
        return model.eval()

    return make


def _classifier(family: str, **more: Any) -> Callable[[], Any]:
    def make() -> nn.Module:
        torch.manual_seed(7)
        config = getattr(transformers, f"{family}Config")(**SIZES | {"num_labels": 3} | more)
        kind = "ImageClassification" if family == "ViT" else "SequenceClassification"
        model: nn.Module = getattr(transformers, f"{family}For{kind}")(config)
        return model.eval()

    return make


def _gpt2() -> Any:
    torch.manual_seed(7)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def _opt() -> Any:
    torch.manual_seed(7)
    config = transformers.OPTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, vocab_size=64,
        max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=0,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config).eval()


def _t5() -> Any:
    torch.manual_seed(7)
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": _causal("Llama", num_key_value_heads=2),
    "qwen2": _causal("Qwen2", num_key_value_heads=2),
    "mistral": _causal("Mistral", num_key_value_heads=2),
    "gemma": _causal("Gemma", num_key_value_heads=2, head_dim=8),
    "gpt2": _gpt2,
    "opt": _opt,
    "bert": _classifier("Bert"),
    "roberta": _classifier("Roberta"),
    "deberta-v2": _classifier("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "t5": _t5,
    "vit": _classifier("ViT", image_size=8, patch_size=4, num_channels=3),
    "mixture": _causal("Mixtral", num_key_value_heads=2, num_local_experts=4),
}
"""By the name of the family: decoders with grouped queries and gated MLPs, GPT-2 and OPT, encoders,
an encoder-decoder, images, and experts whose weights are fused."""


def inputs_of(name: str) -> dict[str, Tensor]:
    """A batch of three for the model of that name."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=generator)}
    ids_BT = torch.randint(3, 64, (3, 7), generator=generator)
    inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    if name == "t5":
        inputs["decoder_input_ids"] = torch.randint(3, 64, (3, 5), generator=generator)
    return inputs


def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model's logits."""
    result: Tensor = model(**inputs).logits
    return result
