"""PEFT loads what is written for it, and what PEFT wrote is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sidepath.convert.folders import UNVERIFIED
from sidepath.convert.formats import convert, format_of
from sidepath.convert.portable import Base
from sidepath.errors import DamagedAdapter, StoreError, WrongBase
from sidepath.methods.bottleneck import Bottleneck
from sidepath.store.adapter import inject, load

from .conftest import biased_llama
from .made import KINDS, SPECIAL, made, options, randomise, same_adapter, save_base

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{said}")  # PEFT's own
    for said in ("`is_gradient_checkpointing` is deprecated", "Setting `save_embedding_layers`")
]
IDS = torch.tensor([[1, 5, 9, 33, 7, 2, 60, 11]])
PEFT: dict[str, dict[str, Any]] = {
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {"down_proj": 20},
    },
    "rank-stabilised": {"r": 4, "target_modules": ["v_proj"], "use_rslora": True},
    "DoRA": {"r": 3, "target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "whole head": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "biases": {"r": 2, "target_modules": ["q_proj"], "bias": "lora_only"},
    "every bias": {"r": 2, "target_modules": ["q_proj"], "bias": "all"},
    "embedding": {"r": 2, "target_modules": ["embed_tokens", "q_proj"]},
}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
        return found


@pytest.mark.parametrize("kind", PEFT)
def test_what_peft_wrote(kind: str, llama: Base, tmp_path: Path) -> None:
    import peft

    theirs = peft.get_peft_model(biased_llama(), peft.LoraConfig(**PEFT[kind]))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.3
    theirs.save_pretrained(tmp_path / "peft")
    assert format_of(tmp_path / "peft") == "peft"
    found = convert(tmp_path / "peft", tmp_path / "ours", "sidepath", options=options(llama))
    assert found.notes == ()
    assert format_of(tmp_path / "ours") == "sidepath"
    model = biased_llama()
    load(model, tmp_path / "ours", "ours")
    assert torch.allclose(logits(model), logits(theirs), atol=1e-4)
    convert(tmp_path / "ours", tmp_path / "again", "peft")
    again = peft.PeftModel.from_pretrained(biased_llama(), tmp_path / "again")
    assert torch.allclose(logits(again), logits(theirs), atol=1e-4)


def test_without_a_base_it_is_said_that_it_is_not_verified(tmp_path: Path) -> None:
    folder, _ = made(biased_llama, tmp_path / "ours", **KINDS["plain"])
    convert(folder, tmp_path / "peft", "peft")
    found = convert(tmp_path / "peft", tmp_path / "back", "sidepath")
    assert found.notes == (UNVERIFIED,)
    assert not (tmp_path / "back" / "sidepath.json").exists()


def test_another_base_is_refused(llama: Base, tmp_path: Path) -> None:
    folder, _ = made(biased_llama, tmp_path / "ours", **KINDS["plain"])
    other = biased_llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.01
    base = save_base(other, tmp_path / "other")
    with pytest.raises(WrongBase):
        convert(folder, tmp_path / "out", "sidepath", options=options(base))
    convert(folder, tmp_path / "a.gguf", "gguf", options=options(llama))
    with pytest.raises(WrongBase):
        convert(tmp_path / "a.gguf", tmp_path / "out", "sidepath", options=options(base))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["gguf", "mlx", "peft"])
def test_a_base_of_other_shapes_is_refused(to: str, tmp_path: Path) -> None:
    """Known by its config alone, so that no fingerprint tells them apart."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, model = made(biased_llama, tmp_path / "ours", **KINDS["plain"])
    config = {**model.config.to_dict(), "hidden_size": 48, "num_attention_heads": 6}  # type: ignore[operator, union-attr]
    other = LlamaForCausalLM(LlamaConfig(**{**config, "num_key_value_heads": 3, "head_dim": 8}))
    with pytest.raises(DamagedAdapter, match="does not fit") as raised:
        convert(folder, tmp_path / "out", to, options=options(Base(other)))
    assert len(raised.value.faults) > 1
    assert not (tmp_path / "out").exists()


def test_two_updates_of_one_module_are_refused(tmp_path: Path) -> None:
    """One as a matrix's and one as an embedding's: neither is dropped in silence."""
    folder, _ = made(biased_llama, tmp_path / "ours", r=2, targets=("q_proj",))
    convert(folder, tmp_path / "peft", "peft")
    path = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(path)
    start = "base_model.model.model.layers.0.self_attn.q_proj.lora_embedding_"
    save_file({**tensors, f"{start}A": torch.ones(2, 32), f"{start}B": torch.ones(32, 2)}, path)
    with pytest.raises(DamagedAdapter, match="of a matrix and that of an embedding"):
        convert(tmp_path / "peft", tmp_path / "back", "sidepath")


def test_a_name_that_is_the_tail_of_another_is_an_expression(tmp_path: Path) -> None:
    """Without the base nobody knows what else a list would hit."""
    folder, _ = made(biased_llama, tmp_path / "ours", **KINDS["one layer"])
    convert(folder, tmp_path / "mlx", "mlx")
    values = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    del values["sidepath"]
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(values))
    convert(tmp_path / "mlx", tmp_path / "peft", "peft")
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert settings["target_modules"] == r"model\.layers\.1\.self_attn\.q_proj"
    import peft

    model = biased_llama()
    load(model, folder, "ours")
    again = peft.PeftModel.from_pretrained(biased_llama(), tmp_path / "peft")
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


def test_a_copy_of_ours_is_the_same(tmp_path: Path) -> None:
    folder, _ = made(biased_llama, tmp_path / "ours", **SPECIAL["DoRA"])
    convert(folder, tmp_path / "copy", "sidepath")
    same_adapter(folder, tmp_path / "copy")
    with pytest.raises(StoreError, match="over the one"):
        convert(folder, tmp_path / "ours" / ".." / "ours", "peft")


def test_other_methods_are_refused(tmp_path: Path) -> None:
    model = biased_llama()
    adapter = inject(model, Bottleneck(), "made")
    randomise(adapter)
    adapter.save(tmp_path / "ours")
    with pytest.raises(StoreError, match="no other tool's format"):
        convert(tmp_path / "ours", tmp_path / "peft", "sidepath")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"r": 3}, "the settings say rank 3"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"rank_pattern": {".*": 2}}, "regular expression"),
        ({"shadow": 1}, "shadow: unknown field"),
    ],
)
def test_settings_that_do_not_fit(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder, _ = made(biased_llama, tmp_path / "ours", **KINDS["plain"])
    convert(folder, tmp_path / "peft", "peft")
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DamagedAdapter, match=said):
        convert(tmp_path / "peft", tmp_path / "back", "sidepath")
    assert not (tmp_path / "back").exists()
