"""One adapter at weight 1 is itself, for every kind: what the usual tool fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sidepath
from sidepath import Combination, combine
from sidepath.errors import StoreError
from tests.combining.kit import IDS, contents, logits, saved
from tests.conftest import MODELS, outputs, tiny_bert, tiny_gpt2, tiny_llama

Make = Callable[[], Any]


def vision() -> Any:
    """Convolutions, one of them grouped: the same ones each time."""
    torch.manual_seed(7)
    return MODELS["vision"][0]()


ADAPTERS: dict[str, tuple[Make, dict[str, Any]]] = {
    "plain": (tiny_llama, {"r": 4, "alpha": 8}),
    "rslora": (tiny_llama, {"r": 3, "alpha": 5, "scaling": "alpha/sqrt(r)"}),
    "patterns": (
        tiny_llama,
        {"r": 4, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.*": 3.0}},
    ),
    "dora": (tiny_llama, {"r": 4, "dora": True, "targets": ("q_proj", "v_proj")}),
    "biases of adapted layers": (tiny_bert, {"r": 2, "bias": "lora", "targets": ("query",)}),
    "all biases, and a head": (
        tiny_bert,
        {"r": 2, "bias": "all", "train_whole": ("classifier",), "targets": ("query",)},
    ),
    "parts": (tiny_gpt2, {"r": 2, "targets": ("c_attn:q,v",)}),
    "embedding": (tiny_llama, {"r": 2, "targets": ("embed_tokens", "q_proj")}),
    "bfloat16": (tiny_llama, {"r": 3, "dtype": "bfloat16"}),
    "convolutions": (vision, {"r": 2, "targets": ("stem", "grouped", "head")}),
}
KINDS: dict[str, Combination] = {
    "concatenate": Combination(),
    "concatenate, weight said": Combination(weights=(1.0,)),
    "svd": Combination(kind="svd", r=4),
    "svd, more than there is": Combination(kind="svd", r=64),
    "ties": Combination(kind="ties", r=4, density=0.1),
    "dare": Combination(kind="dare", r=8, density=0.1, seed=9),
    "dare-ties": Combination(kind="dare-ties", r=8),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_one_adapter_at_weight_1_is_itself(tmp_path: Path, name: str, kind: str) -> None:
    make, settings = ADAPTERS[name]
    source = saved(tmp_path / "source", 1, make, **settings)
    found = combine([source], tmp_path / "again", KINDS[kind])
    old, new = contents(source), contents(tmp_path / "again")
    assert set(new) == set(old)
    for file in ("adapter_model.safetensors", "adapter_config.json", "settings.toml"):
        assert new[file] == old[file]
    adapter = sidepath.load(make(), tmp_path / "again")
    assert adapter.config == sidepath.load(make(), source).config
    assert adapter.record["seed"] == 1
    assert adapter.record["combined"]["adapters"] == found.adapters
    assert found.error == 0.0


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != "dora"])
def test_cut_to_its_own_energy_it_gives_the_same_up_to_rounding(tmp_path: Path, name: str) -> None:
    """The long way: every layer decomposed and written anew, all else carried over."""
    make, settings = ADAPTERS[name]
    source = saved(tmp_path / "source", 1, make, **settings)
    combine([source], tmp_path / "again", Combination(kind="svd", energy=1.0))
    model = make()
    if name == "convolutions":
        inputs = torch.randn(2, 3, 6, 6)
    else:
        inputs = IDS
    base = outputs(model, inputs)
    found = []
    for folder in (source, tmp_path / "again"):
        sidepath.load(model, folder, "it")
        found.append(outputs(model, inputs))
        sidepath.remove(model, "it")
    one, other = found
    assert float((one - other).abs().max()) < 1e-5 * max(1.0, float((one - base).abs().max()))


def test_dora_is_refused_where_it_would_change(tmp_path: Path) -> None:
    dora = saved(tmp_path / "dora", 1, r=4, dora=True, targets=("q_proj",))
    plain = saved(tmp_path / "plain", 2, r=4, targets=("v_proj",))
    for folders, recipe in (
        ([dora, plain], Combination()),
        ([dora], Combination(weights=(0.5,))),
        ([dora], Combination(kind="svd", r=2)),
        ([dora], Combination(kind="svd", energy=0.9)),
    ):
        with pytest.raises(StoreError, match="DoRA's update is no sum"):
            combine(folders, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


PEFT_FAILS = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "whole": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
@pytest.mark.parametrize("name", PEFT_FAILS)
def test_pefts_own_is_another_adapter(tmp_path: Path, name: str, kind: str) -> None:
    """What PEFT makes of one adapter at weight 1 is not it; ours, of the same folder, is."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        **PEFT_FAILS[name],  # type: ignore[arg-type]
    )
    model = get_peft_model(tiny_llama(), config, "one").eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "saved")
    wanted = outputs(model, IDS)
    model.add_weighted_adapter(["one"], [1.0], "again", combination_type=kind)
    model.set_adapter("again")
    changed = float((wanted - outputs(tiny_llama(), IDS)).norm())
    assert float((outputs(model, IDS) - wanted).norm()) > 0.05 * changed
    combine([tmp_path / "saved" / "one"], tmp_path / "ours")
    with pytest.warns(UserWarning, match="could not be verified"):
        ours = logits(tiny_llama, tmp_path / "ours")
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    assert load_file(tmp_path / "ours" / "adapter_model.safetensors").keys()
