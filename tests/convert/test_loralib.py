"""loralib's files: its own layers take what is written, fused projections included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sidepath.convert.formats import convert, format_of
from sidepath.convert.portable import Base
from sidepath.errors import ConfigError, DamagedAdapter, StoreError
from sidepath.store.adapter import load
from tests.conftest import tiny_gpt2

from .conftest import biased_llama
from .made import ATTENTION, KINDS, made, options, same_adapter, save_base

IDS = torch.tensor([[1, 5, 9, 33, 7, 2, 60, 11]])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
        return found


def alphas_of(path: Path) -> dict[str, float]:
    with safe_open(path, "pt") as file:
        return dict(json.loads(file.metadata()["lora_alpha"]))


def with_loralib(model: nn.Module, path: Path, enabled: dict[str, list[bool]]) -> nn.Module:
    """The model with loralib's own layers in the places that the file names."""
    loralib: Any = pytest.importorskip("loralib", reason="loralib is not installed")
    state, alphas = load_file(path), alphas_of(path)
    for name in {key.removesuffix(".lora_A") for key in state if key.endswith(".lora_A")}:
        old: Any = model.get_submodule(name)
        r = state[f"{name}.lora_B"].shape[1]
        settings = {"r": r, "lora_alpha": alphas[name]}
        last = name.rpartition(".")[2]
        if isinstance(old, nn.Embedding):
            new = loralib.Embedding(old.num_embeddings, old.embedding_dim, **settings)
        elif last in enabled:  # transformers' Conv1D, which is (in, out)
            columns, rows = old.weight.shape
            new = loralib.MergedLinear(columns, rows, enable_lora=enabled[last], **settings)
            old.weight = nn.Parameter(old.weight.T.contiguous())
        else:
            biased = old.bias is not None
            new = loralib.Linear(old.in_features, old.out_features, bias=biased, **settings)
        new.load_state_dict(old.state_dict(), strict=False)
        model.set_submodule(name, new)
    left = model.load_state_dict(state, strict=False)
    assert left.unexpected_keys == []
    return model.train()  # loralib's eval would merge; there is no dropout in this model


@pytest.mark.parametrize("kind", ["plain", "rank pattern", "alpha pattern", "rank-stabilised"])
def test_logits_in_loralib(kind: str, tmp_path: Path) -> None:
    settings = KINDS[kind] | {"targets": (*ATTENTION, "embed_tokens"), "bias": "lora"}
    folder, model = made(biased_llama, tmp_path / "ours", **settings)
    found = convert(folder, tmp_path / "lora.safetensors", "loralib")
    assert "lora_alpha" in found.notes[0]
    theirs = with_loralib(biased_llama(), tmp_path / "lora.safetensors", {})
    with torch.no_grad():
        answer = theirs(IDS).logits
    effect = (logits(biased_llama()) - logits(model)).abs().max()
    assert (answer - logits(model)).abs().max() < 1e-4 * effect


def quiet_gpt2() -> Any:
    """Without dropout, so that it may stand in training mode."""
    model = tiny_gpt2()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def test_fused_projections_both_ways(tmp_path: Path) -> None:
    """`enable_lora=[True, False, True]` of GPT-2's c_attn."""
    base = save_base(quiet_gpt2(), tmp_path / "base")
    settings: dict[str, Any] = {"r": 2, "alpha": 6, "targets": ("c_attn:q,v",)}
    folder, model = made(quiet_gpt2, tmp_path / "ours", **settings)
    path = tmp_path / "lora.safetensors"
    found = convert(folder, path, "loralib")
    assert found.notes[0] == "make every loralib layer with lora_alpha=6"
    state = load_file(path)
    assert state["transformer.h.0.attn.c_attn.lora_A"].shape == (4, 32)
    assert state["transformer.h.0.attn.c_attn.lora_B"].shape == (64, 2)
    convert(path, tmp_path / "back", "sidepath")
    same_adapter(folder, tmp_path / "back")
    plain = tmp_path / "plain.safetensors"
    save_file(state, plain)
    read = options(base, alpha=6.0, fused={"c_attn": (True, False, True)})
    convert(plain, tmp_path / "read", "sidepath", options=read)
    again = quiet_gpt2()
    load(again, tmp_path / "read", "read")
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    pytest.importorskip("loralib", reason="loralib is not installed")
    theirs = gpt2_with_loralib(path)
    with torch.no_grad():
        answer = theirs(IDS).logits
    assert torch.allclose(answer, logits(model), atol=1e-4)


def gpt2_with_loralib(path: Path) -> nn.Module:
    return with_loralib(quiet_gpt2(), path, {"c_attn": [True, False, True]})


def test_from_loralib_needs_the_base_and_alpha(llama: Base, tmp_path: Path) -> None:
    folder, model = made(biased_llama, tmp_path / "ours", **KINDS["plain"])
    convert(folder, tmp_path / "ours.safetensors", "loralib")
    plain = tmp_path / "plain.safetensors"
    save_file(load_file(tmp_path / "ours.safetensors"), plain)
    assert format_of(plain) == "loralib"
    with pytest.raises(ConfigError, match="--base and --alpha"):
        convert(plain, tmp_path / "back", "sidepath")
    convert(plain, tmp_path / "back", "sidepath", options=options(llama, alpha=8.0))
    fresh = biased_llama()
    load(fresh, tmp_path / "back", "back")
    assert torch.equal(logits(fresh), logits(model))


def test_unequal_parts_are_refused(tmp_path: Path) -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    def phi() -> Any:
        torch.manual_seed(1)
        config = Phi3Config(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return Phi3ForCausalLM(config).eval()

    folder, _ = made(phi, tmp_path / "ours", r=2, targets=("qkv_proj:q,v",))
    with pytest.raises(StoreError, match="are not equal"):
        convert(folder, tmp_path / "x.safetensors", "loralib")


def test_all_faults_at_once_and_no_pickle(tmp_path: Path) -> None:
    folder, _ = made(biased_llama, tmp_path / "ours", **KINDS["plain"])
    path = tmp_path / "ours.safetensors"
    convert(folder, path, "loralib")
    tensors = load_file(path)
    start = "model.layers.0.self_attn."
    del tensors[f"{start}q_proj.lora_A"]
    tensors[f"{start}k_proj.lora_B"] = torch.zeros(3)
    tensors["stray.lora_A"] = torch.zeros(2, 2)
    with safe_open(path, "pt") as file:
        save_file(tensors, tmp_path / "bad.safetensors", metadata=file.metadata())
    with pytest.raises(DamagedAdapter) as raised:
        convert(tmp_path / "bad.safetensors", tmp_path / "b", "sidepath")
    said = " ".join(raised.value.faults)
    for word in (f"{start}q_proj: lora_A", f"{start}k_proj: lora_A", "stray.lora_A: unexpected"):
        assert word in said
    (tmp_path / "state.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(StoreError, match="pickle files are never loaded"):
        convert(tmp_path / "state.pt", tmp_path / "b", "sidepath")
    assert not (tmp_path / "b").exists()
    with pytest.raises(ConfigError, match="what is written is none"):
        convert(folder, tmp_path / "out.pt", "loralib")
    assert not (tmp_path / "out.pt").exists()
