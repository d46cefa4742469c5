"""From patterns to places: presets on every kind of model, and errors that name the nearest."""

from __future__ import annotations

import pytest
import torch

from sidepath.errors import TargetNotFound, UnsupportedModule
from sidepath.injection.targets import resolve
from sidepath.methods.lora import LoRA
from tests.conftest import Vision, tiny_bert, tiny_gpt2, tiny_llama


def last_parts(model: torch.nn.Module, **settings: object) -> list[str]:
    sites = resolve(model, LoRA(**settings))  # type: ignore[arg-type]
    return sorted({site.path.rpartition(".")[2] for site in sites})


def test_presets_on_llama() -> None:
    attention = ["k_proj", "o_proj", "q_proj", "v_proj"]
    mlp = ["down_proj", "gate_proj", "up_proj"]
    assert last_parts(tiny_llama(), targets=("attention",)) == attention
    assert last_parts(tiny_llama(), targets=("mlp",)) == mlp
    assert last_parts(tiny_llama(), targets=("all-linear",)) == sorted(attention + mlp)


def test_presets_tell_gpt2s_two_c_proj_apart() -> None:
    attention = resolve(tiny_gpt2(), LoRA(targets=("attention",)))
    assert [site.path.split(".", 3)[3] for site in attention] == ["attn.c_attn", "attn.c_proj"] * 2
    assert len(resolve(tiny_gpt2(), LoRA())) == 8


def test_presets_leave_heads_and_embeddings_alone() -> None:
    assert "classifier" not in last_parts(tiny_bert())
    assert last_parts(tiny_bert(), targets=("attention",)) == ["dense", "key", "query", "value"]
    assert "lm_head" not in last_parts(tiny_llama())


def test_parts_of_a_fused_projection() -> None:
    sites = resolve(tiny_gpt2(), LoRA(targets=("c_attn:q,v",), layers=(1,)))
    assert [(site.path, site.parts) for site in sites] == [
        ("transformer.h.1.attn.c_attn", ((0, 32), (64, 96)))
    ]


def test_unequal_parts_follow_the_heads() -> None:
    """Phi-3 fuses 4 query heads with 2 key and 2 value heads."""
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        pad_token_id=0,
    )
    sites = resolve(Phi3ForCausalLM(config), LoRA(targets=("qkv_proj:k,v", "gate_up_proj:up")))
    assert [site.parts for site in sites] == [((32, 48), (48, 64)), ((64, 128),)]


def test_exclude_layers_whole_and_bias_narrow_or_widen() -> None:
    model = tiny_bert()
    assert last_parts(model, targets=("attention",), exclude=("key", "output.dense")) == [
        "query",
        "value",
    ]
    one = resolve(model, LoRA(targets=("query",), layers=(1,)))
    assert [site.path for site in one] == ["bert.encoder.layer.1.attention.self.query"]
    whole = resolve(model, LoRA(targets=("*",), train_whole=("classifier", "layer.1")))
    kinds = {site.path: site.kind for site in whole}
    assert kinds["classifier"] == "whole"
    assert kinds["bert.encoder.layer.1"] == "whole"
    assert not any(path.startswith("bert.encoder.layer.1.") for path in kinds)
    biases = resolve(model, LoRA(targets=("query",), bias="all"))
    assert {site.kind for site in biases} == {"dense", "bias"}
    assert len(biases) == sum(name.endswith("bias") for name, _ in model.named_parameters())


def test_sites_keep_the_models_order_and_the_last_pattern() -> None:
    sites = resolve(tiny_llama(), LoRA(targets=("v_proj", "*.q_proj", "q_proj")))
    assert [site.pattern for site in sites] == ["q_proj", "v_proj"] * 2


def test_every_pattern_that_matches_nothing_is_named_with_the_nearest() -> None:
    with pytest.raises(TargetNotFound) as caught:
        resolve(tiny_llama(), LoRA(targets=("*.q_projj", "v_proj", "wq")))
    text = str(caught.value)
    assert 'pattern "*.q_projj" matched none of 16 layers. Closest: "*.q_proj" (2)' in text
    assert 'pattern "wq" matched none' in text
    assert '"v_proj" matched' not in text


@pytest.mark.parametrize(
    "settings",
    [
        {"exclude": ("lm_hed",)},
        {"layers": (0, 9)},
        {"train_whole": ("classifier",)},
        {"rank_pattern": {"q_prj": 4}},
        {"alpha_pattern": {"q_prj": 4.0}},
        {"bias": "all"},
        {"bias": "lora"},
        {"targets": ("q_proj",), "exclude": ("q_proj",)},
        {"targets": ("down_proj:q",)},
    ],
)
def test_nothing_is_ignored_in_silence(settings: dict[str, object]) -> None:
    with pytest.raises(TargetNotFound):
        resolve(tiny_llama(), LoRA(**settings))  # type: ignore[arg-type]


def test_modules_without_a_matrix_are_refused_by_type() -> None:
    with pytest.raises(UnsupportedModule, match="LlamaAttention"):
        resolve(tiny_llama(), LoRA(targets=("self_attn",)))
    with pytest.raises(UnsupportedModule, match="BatchNorm2d"):
        resolve(Vision(), LoRA(targets=("norm",)))


def test_a_layer_that_is_read_and_never_called_is_refused() -> None:
    """nn.MultiheadAttention reads out_proj's weight: a side path there would never act."""
    with pytest.raises(UnsupportedModule, match="NonDynamicallyQuantizableLinear"):
        resolve(torch.nn.MultiheadAttention(8, 2), LoRA(targets=("out_proj",)))
