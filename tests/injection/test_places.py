"""The places that presets name, on models of many families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from sidepath.errors import UnsupportedModule
from sidepath.injection.places import preset_paths
from tests.methods.architectures import ARCHITECTURES, SIZES

PLACES = {
    "llama": (["self_attn.o_proj"], ["mlp.down_proj"]),
    "qwen2": (["self_attn.o_proj"], ["mlp.down_proj"]),
    "mistral": (["self_attn.o_proj"], ["mlp.down_proj"]),
    "gemma": (["self_attn.o_proj"], ["mlp.down_proj"]),
    "gpt2": (["attn.c_proj"], ["mlp.c_proj"]),
    "opt": (["self_attn.out_proj"], ["fc2"]),
    "bert": (["attention.output.dense"], ["output.dense"]),
    "roberta": (["attention.output.dense"], ["output.dense"]),
    "deberta-v2": (["attention.output.dense"], ["output.dense"]),
    "vit": (["attention.o_proj"], ["mlp.fc2"]),
    "mixture": (["self_attn.o_proj"], ["mlp"]),
}
"""In each block: what attention and MLP write into the residual stream with."""


@pytest.mark.parametrize("name", PLACES)
def test_the_layers_that_write_into_the_residual_stream(name: str) -> None:
    model = ARCHITECTURES[name]()
    for preset, ends in zip(("attention-output", "mlp-output"), PLACES[name], strict=True):
        paths = preset_paths(model, preset)
        blocks = preset_paths(model, "blocks")
        assert paths == [f"{block}.{end}" for block in blocks for end in ends]
        assert len(blocks) == 2


def test_t5_has_them_in_both_stacks_and_in_cross_attention() -> None:
    model = ARCHITECTURES["t5"]()
    attention = [path.split(".", 4)[-1] for path in preset_paths(model, "attention-output")]
    own, cross = "0.SelfAttention.o", "1.EncDecAttention.o"
    assert attention == [own, own, own, cross, own, cross]
    ends = [path.split(".", 4)[-1] for path in preset_paths(model, "mlp-output")]
    assert ends == [f"{at}.DenseReluDense.wo" for at in (1, 1, 2, 2)]
    found = preset_paths(model, "token-embedding")
    assert found == ["encoder.embed_tokens", "decoder.embed_tokens"], "`shared` is never run"


MORE: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "GPTNeoX": ({}, ["attention.dense"], ["mlp.dense_4h_to_h"]),
    "Phi": ({}, ["self_attn.dense"], ["mlp.fc2"]),
    "Bloom": ({"n_layer": 2, "n_head": 4}, ["self_attention.dense"], ["mlp.dense_4h_to_h"]),
    "Falcon": ({}, ["self_attention.dense"], ["mlp.dense_4h_to_h"]),
    "DistilBert": (
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
        ["attention.out_lin"],
        ["ffn.lin2"],
    ),
    "Gemma2": ({"head_dim": 8}, ["self_attn.o_proj"], ["mlp.down_proj"]),
    "Olmo2": ({}, ["self_attn.o_proj"], ["mlp.down_proj"]),
    "Phi3": ({}, ["self_attn.o_proj"], ["mlp.down_proj"]),
    "Qwen2Moe": ({"num_experts": 4, "decoder_sparse_step": 1}, ["self_attn.o_proj"], ["mlp"]),
    "GptOss": ({"num_local_experts": 4, "head_dim": 8}, ["self_attn.o_proj"], ["mlp"]),
    "DeepseekV3": (
        {"first_k_dense_replace": 0, "n_routed_experts": 8, "n_group": 2, "topk_group": 1},
        ["self_attn.o_proj"],
        ["mlp"],
    ),
}
"""Families of other names and shapes: settings, and what writes into the stream in each block."""


@pytest.mark.parametrize("family", MORE)
def test_they_are_found_by_structure_in_families_nobody_listed(family: str) -> None:
    settings, attention, mlp = MORE[family]
    config = getattr(transformers, f"{family}Config")(**SIZES | settings)
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, f"{family}Model")(config)
    blocks = preset_paths(model, "blocks")
    assert len(blocks) == 2
    for preset, ends in (("attention-output", attention), ("mlp-output", mlp)):
        assert preset_paths(model, preset) == [f"{b}.{end}" for b in blocks for end in ends]


def test_mlps_as_whole_modules() -> None:
    for name in ("llama", "gpt2", "vit", "mixture"):
        model = ARCHITECTURES[name]()
        blocks = preset_paths(model, "blocks")
        assert preset_paths(model, "mlp-module") == [f"{block}.mlp" for block in blocks]
    found = preset_paths(ARCHITECTURES["t5"](), "mlp-module")
    assert [path.split(".", 4)[-1] for path in found] == [
        f"{at}.DenseReluDense" for at in (1, 1, 2, 2)
    ]
    with pytest.raises(UnsupportedModule, match="no module of its own") as caught:
        preset_paths(ARCHITECTURES["opt"](), "mlp-module")
    assert "fc1, fc2 stand in the block itself" in caught.value.faults[0]
