"""What vLLM takes, by the rules in its sources; and adapters made to fit them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sidepath.convert.formats import convert
from sidepath.convert.portable import Base, Options, Portable, read_adapter
from sidepath.convert.vllm import judged
from sidepath.errors import StoreError
from sidepath.store.adapter import load

from .conftest import biased_llama
from .made import ATTENTION, KINDS, SPECIAL, made

IDS = torch.tensor([[1, 5, 9, 33, 7, 2, 60, 11]])


def by_the_rules(folder: Path) -> Any:
    """Slow reference: vLLM's reading of a folder. One scale, from r, lora_alpha and use_rslora."""
    from safetensors.torch import load_file

    values = json.loads((folder / "adapter_config.json").read_text())
    r, alpha = values["r"], values["lora_alpha"]
    scale = alpha / (math.sqrt(r) if values["use_rslora"] else r)
    tensors = load_file(folder / "adapter_model.safetensors")
    model = biased_llama()
    for key, A in tensors.items():
        if key.endswith(".lora_A.weight"):
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            B = tensors[key.replace("lora_A", "lora_B")]
            assert len(A) <= r
            with torch.no_grad():
                model.get_submodule(path).weight += scale * (B.double() @ A.double()).float()
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
        return found


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("bfloat16", "float16")])
def test_what_is_written_for_vllm_computes_the_same_there(kind: str, tmp_path: Path) -> None:
    folder, model = made(biased_llama, tmp_path / "ours", **KINDS[kind])
    own = "pattern" in kind
    before = judged(read_adapter(folder, Options()), None)
    assert bool(before.faults) == own
    expected = logits(model)
    effect = (expected - logits(biased_llama())).abs().max()
    wrong = (logits(by_the_rules(folder)) - expected).abs().max()
    assert (wrong > 1e-2 * effect) == own, "vLLM would have computed something else"
    found = convert(folder, tmp_path / "vllm", "peft", for_vllm=True)
    assert any("--max-lora-rank" in note for note in found.notes)
    assert judged(read_adapter(tmp_path / "vllm", Options()), None).faults == ()
    assert (logits(by_the_rules(tmp_path / "vllm")) - expected).abs().max() < 1e-4 * effect
    fresh = biased_llama()
    with pytest.warns(UserWarning, match="could not be verified"):
        load(fresh, tmp_path / "vllm", "vllm")
    assert torch.allclose(logits(fresh), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("DoRA", "DoRA is not supported"),
        ("biases", "bias (lora, 8 tensors)"),
        ("every bias", "bias (all, "),
        ("trained whole", "modules_to_save (lm_head)"),
    ],
)
def test_what_it_refuses(kind: str, said: str, llama: Base, tmp_path: Path) -> None:
    folder, _ = made(biased_llama, tmp_path / "ours", **SPECIAL[kind])
    verdict = judged(read_adapter(folder, Options()), llama)
    assert not verdict.mendable
    assert any(said in fault for fault in verdict.faults), verdict.faults
    with pytest.raises(StoreError, match="nothing was written"):
        convert(folder, tmp_path / "vllm", "peft", for_vllm=True)
    assert not (tmp_path / "vllm").exists()


def test_all_of_it_at_once(llama: Base, tmp_path: Path) -> None:
    settings = SPECIAL["trained whole"] | {"bias": "lora", "alpha_pattern": {"k_proj": 9}}
    settings |= {"targets": ATTENTION, "dora": True}
    folder, _ = made(biased_llama, tmp_path / "ours", **settings)
    said = " ".join(judged(read_adapter(folder, Options()), llama).faults)
    for word in ("DoRA", "modules_to_save", "bias (lora", "2 of 8 modules have a scale"):
        assert word in said


def portable(size: int, **values: Any) -> Portable:
    """One update of this rank."""
    start = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{start}.lora_A.weight": torch.zeros(size, 2),
        f"{start}.lora_B.weight": torch.zeros(2, size),
    }
    return Portable(tensors, {"peft_type": "LORA", "r": size, "lora_alpha": size, **values})


@pytest.mark.parametrize(("r", "need"), [(1, 1), (2, 8), (8, 8), (9, 16), (65, 128), (257, 320)])
def test_the_least_max_lora_rank(r: int, need: int) -> None:
    assert judged(portable(r), None).max_lora_rank == need


def test_a_rank_above_all() -> None:
    verdict = judged(portable(600), None)
    assert verdict.max_lora_rank is None
    assert "--truncate r=512" in verdict.faults[0]
    assert not verdict.mendable


def test_a_rank_pattern_above_r() -> None:
    path = "^model.layers.0.self_attn.q_proj"
    one = portable(4, r=2, lora_alpha=2, rank_pattern={path: 4}, alpha_pattern={path: 4})
    assert ["rank_pattern has rank 4" in fault for fault in judged(one, None).faults] == [True]


def test_kinds_of_modules(llama: Base) -> None:
    tensors = {
        "base_model.model.conv.lora_A.weight": torch.zeros(2, 3, 1, 1),
        "base_model.model.conv.lora_B.weight": torch.zeros(4, 2, 1, 1),
        "base_model.model.wpe.lora_embedding_A": torch.zeros(2, 9),
        "base_model.model.wpe.lora_embedding_B": torch.zeros(4, 2),
    }
    one = Portable(tensors, {"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    said = judged(one, llama).faults
    assert [fault.partition(":")[0] for fault in said] == ["conv", "conv", "wpe", "wpe"]
    assert "convolutions" in said[0]
    assert "embed_tokens and lm_head only" in said[2]
    assert "no such module" in said[3]
