"""PEFT 0.21 computes what we compute from what we save, and we from what it saves."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sidepath.errors import DamagedAdapter, SidepathNotice
from sidepath.methods.lora import LoRA
from sidepath.methods.lowrank import LowRank
from sidepath.store.adapter import inject, load
from tests.conftest import Vision, outputs, randomise, tiny_bert, tiny_gpt2, tiny_llama

peft = pytest.importorskip("peft")


class Mixed(nn.Module):
    """Every kind of layer, and names of which one is the tail of another."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(16, 8, padding_idx=0)
        self.lin = nn.Linear(8, 12)
        self.inner = nn.ModuleDict({"lin": nn.Linear(12, 12), "other": nn.Linear(12, 12)})
        self.fused = Conv1D(30, 12)
        self.conv1 = nn.Conv1d(30, 6, 3, padding=1)
        self.conv3 = nn.Conv3d(1, 2, (1, 2, 2))
        self.norm = nn.LayerNorm(6)
        self.score_of_all = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) ids to (B, 3) numbers."""
        hidden = self.inner["other"](self.inner["lin"](self.lin(self.emb(ids)).tanh()).tanh())
        mixed = self.conv1(self.fused(hidden).transpose(1, 2)).transpose(1, 2)
        cube = self.conv3(hidden[:, None, None]).mean(dim=(1, 2, 3, 4))
        result: Tensor = self.score_of_all(self.norm(mixed)).mean(1) + cube[:, None]
        return result


def mixed() -> nn.Module:
    torch.manual_seed(3)
    return Mixed().eval()


def IDS() -> Tensor:
    """Token ids for every model here."""
    return torch.randint(0, 16, (3, 6))


def IMAGES() -> Tensor:
    """Images for the networks of convolutions."""
    return torch.randn(2, 3, 6, 6)


CASES: dict[str, tuple[Any, Any, LoRA]] = {
    "llama": (tiny_llama, IDS, LoRA(r=4)),
    "gpt2 parts": (tiny_gpt2, IDS, LoRA(r=2, alpha=3, targets=("c_attn:q,v", "c_fc"))),
    "gpt2 one part": (tiny_gpt2, IDS, LoRA(r=2, targets=("c_attn:k",), bias="lora")),
    "gpt2 parts rslora": (
        tiny_gpt2,
        IDS,
        LoRA(r=3, targets=("c_attn:q,v", "wpe"), scaling="alpha/sqrt(r)"),
    ),
    "patterns": (
        tiny_llama,
        IDS,
        LoRA(r=2, rank_pattern={"*.1.mlp.*": 5, "q_proj": 3}, alpha_pattern={"layers.0.*": 0.5}),
    ),
    "bert head": (tiny_bert, IDS, LoRA(r=2, targets=("query",), train_whole=("classifier",))),
    "bert all biases": (tiny_bert, IDS, LoRA(r=2, targets=("query",), bias="all")),
    "bert all biases and head": (
        tiny_bert,
        IDS,
        LoRA(r=2, targets=("query",), bias="all", train_whole=("classifier",)),
    ),
    "every kind": (
        mixed,
        IDS,
        LoRA(r=2, targets=("emb", "inner.lin", "fused", "conv1", "conv3"), bias="lora"),
    ),
    "a name that is another's tail": (
        mixed,
        IDS,
        LoRA(r=2, targets=("lin", "other"), exclude=("inner.lin",)),
    ),
    "tails with ranks": (mixed, IDS, LoRA(r=2, targets=("lin",), rank_pattern={"inner.lin": 4})),
    "whole sequence": (mixed, IDS, LoRA(r=2, targets=("fused",), train_whole=("score_of_all",))),
    "convolutions": (
        lambda: Vision().eval(),
        IMAGES,
        LoRA(r=2, targets=("stem", "grouped", "head"), scaling="alpha/sqrt(r)"),
    ),
    "grouped": (lambda: Vision().eval(), IMAGES, LoRA(r=3, targets=("grouped",))),
    "dora": (tiny_llama, IDS, LoRA(r=3, alpha=5, dora=True, rank_pattern={"q_proj": 2})),
    "dora gpt2": (tiny_gpt2, IDS, LoRA(r=2, dora=True, targets=("c_attn", "c_fc"))),
    "dora biases": (tiny_bert, IDS, LoRA(r=2, dora=True, targets=("value", "dense"), bias="lora")),
}  # fmt: skip


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make(case: str) -> tuple[nn.Module, Tensor, LoRA]:
    factory, inputs, config = CASES[case]
    torch.manual_seed(5)
    return factory(), inputs(), config


def trained(case: str, folder: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """A base, an input, and the outputs of the adapter that was saved."""
    base, x, config = make(case)
    return base, x, saved(base, x, config, folder)


def saved(base: nn.Module, x: Tensor, config: LoRA, folder: Path) -> Tensor:
    """The outputs of an adapter on a copy of the base, that was moved and saved."""
    model = copy.deepcopy(base)
    adapter = inject(model, config, "a")
    randomise(adapter.parameters(), 0.3)
    y = outputs(model, x)
    assert (y - outputs(base, x)).abs().max() > 1e-3
    adapter.save(folder)
    return y


@pytest.mark.parametrize("case", CASES)
def test_both_read_what_we_save(tmp_path: Path, quiet: None, case: str) -> None:
    base, x, y = trained(case, tmp_path / "a")
    ours = copy.deepcopy(base)
    load(ours, tmp_path / "a")
    assert torch.equal(outputs(ours, x), y)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing keys only
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out|.*Merging is not supported")
        theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "a")).eval()
    assert (outputs(theirs, x) - y).abs().max() <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_we_read_what_peft_saves(tmp_path: Path, quiet: None, case: str) -> None:
    base, x, y = trained(case, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "a"))
    theirs.save_pretrained(str(tmp_path / "b"), safe_serialization=True)
    assert not (tmp_path / "b" / "sidepath.json").exists()
    ours = copy.deepcopy(base)
    load(ours, tmp_path / "b")
    assert (outputs(ours, x) - y).abs().max() <= 1e-5


PEFT_CONFIGS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "names": (tiny_llama, IDS, {"target_modules": ["q_proj", "v_proj"]}),
    "expression": (tiny_llama, IDS, {"target_modules": r".*\.(up|down)_proj"}),
    "all-linear rslora": (tiny_gpt2, IDS, {"target_modules": "all-linear", "use_rslora": True}),
    "embedding": (tiny_gpt2, IDS, {"target_modules": ["wte", "wpe"]}),
    "named embedding": (tiny_llama, IDS, {"target_modules": ["embed_tokens", "q_proj"]}),
    "patterns": (
        tiny_llama,
        IDS,
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"q_proj": 3, "^model.layers.1.mlp.up_proj": 2},
            "alpha_pattern": {r"model\.layers\.0\.self_attn\.v_proj": 5},
        },
    ),
    "classifier": (tiny_bert, IDS, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "all biases": (
        tiny_bert,
        IDS,
        {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]},
    ),
    "lora biases": (tiny_bert, IDS, {"target_modules": ["value"], "bias": "lora_only"}),
    "layers": (tiny_llama, IDS, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "convolution": (lambda: Vision().eval(), IMAGES, {"target_modules": ["stem", "head"]}),
    "dora": (tiny_llama, IDS, {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "dora rslora": (
        tiny_gpt2,
        IDS,
        {"target_modules": ["c_fc"], "use_dora": True, "use_rslora": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PEFT_CONFIGS)
def test_we_read_adapters_made_by_peft(tmp_path: Path, quiet: None, case: str) -> None:
    factory, inputs, options = PEFT_CONFIGS[case]
    torch.manual_seed(5)
    base, x = factory(), inputs()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, lora_alpha=6, **options))
    randomise((p for p in theirs.parameters() if p.requires_grad), 0.3)
    y = outputs(theirs.eval(), x)
    theirs.save_pretrained(str(tmp_path / "b"), safe_serialization=True)
    ours = copy.deepcopy(base)
    load(ours, tmp_path / "b")
    assert (outputs(ours, x) - y).abs().max() <= 1e-5
    assert (outputs(base, x) - y).abs().max() > 1e-3


def test_there_is_one_notice_that_the_base_is_not_known(tmp_path: Path, quiet: None) -> None:
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    theirs.save_pretrained(str(tmp_path))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(tiny_llama(), tmp_path, "a")
    notices = [w for w in caught if issubclass(w.category, SidepathNotice)]
    assert len(notices) == 1
    assert "could not be verified" in str(notices[0].message)
    assert notices[0].filename == __file__


def test_what_is_saved_for_parts_is_compact_again_when_loaded(tmp_path: Path) -> None:
    base, _, _ = trained("gpt2 parts", tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    key = "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"
    assert tensors[key].shape == (96, 4)
    assert not tensors[key][32:64].any()
    assert not tensors[key][:32, 2:].any()
    delta = load(base, tmp_path / "a").deltas["transformer.h.0.attn.c_attn"]
    assert isinstance(delta, LowRank)
    assert delta.B.shape == (64, 2)
    assert delta.parts == ((0, 32), (64, 96))


def test_a_grouped_convolution_that_mixes_groups_is_refused(tmp_path: Path, quiet: None) -> None:
    config = peft.LoraConfig(r=2, target_modules=["grouped"])
    theirs = peft.get_peft_model(Vision(), config)
    theirs.save_pretrained(str(tmp_path))
    model = Vision()
    with pytest.raises(DamagedAdapter, match="mixes the groups"):
        load(model, tmp_path, "a")
    assert set(model.state_dict()) == set(Vision().state_dict())


def test_an_embedding_peft_saved_along_must_be_the_bases(tmp_path: Path, quiet: None) -> None:
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"])
    theirs = peft.get_peft_model(tiny_llama(), config)
    theirs.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors[key] = tensors[key] + 1
    save_file(tensors, file)
    with pytest.raises(DamagedAdapter, match="differs from the base's"):
        load(tiny_llama(), tmp_path, "a")


def test_the_settings_name_every_module(tmp_path: Path) -> None:
    trained("gpt2 parts", tmp_path / "a")
    values = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert values["target_modules"] == [
        f"transformer.h.{layer}.{name}" for layer in (0, 1) for name in ("attn.c_attn", "mlp.c_fc")
    ]
    assert values["fan_in_fan_out"] is True
    assert values["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_at_the_weights_is_plain_lora_for_peft(
    tmp_path: Path, quiet: None, start: str
) -> None:
    base, x = tiny_gpt2(), IDS()
    config = LoRA(r=2, start=start, targets=("c_attn:q,v", "c_fc"), scaling="alpha/sqrt(r)")  # type: ignore[arg-type]
    y = saved(base, x, config, tmp_path / "a")
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert settings["init_lora_weights"] is True
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "a")).eval()
    assert (outputs(theirs, x) - y).abs().max() <= 2e-5
