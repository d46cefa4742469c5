"""Tensor by tensor gives the bits that the whole model in memory gives, for every kind of base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from sidepath.errors import MergeError, SidepathNotice, TiedWeights
from sidepath.merging.merge import merge_folder
from sidepath.methods import METHODS
from sidepath.methods.base import Method
from sidepath.methods.lora import LoRA
from sidepath.store.adapter import inject, load
from tests.conftest import outputs, randomise, tiny_bert, tiny_gpt2, tiny_llama
from tests.merging.whole import assert_same, merged_whole, tensors_in

IDS = torch.tensor([[5, 9, 3, 17, 22], [1, 2, 3, 4, 5]])
LLAMA, GPT2 = transformers.LlamaForCausalLM, transformers.GPT2LMHeadModel
BERT = transformers.BertForSequenceClassification


@pytest.fixture(autouse=True)
def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def stored(model: Any, folder: Path, dtype: torch.dtype, shard: str = "1GB") -> Path:
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def adapter(cls: Any, base: Path, folder: Path, config: Method, seed: int = 0, **more: Any) -> Path:
    torch.manual_seed(seed)
    made = inject(cls.from_pretrained(base, dtype="auto", **more).eval(), config, "x")
    randomise(made.parameters(), 0.1)
    return made.save(folder)


def same_as_whole(cls: Any, base: Path, folders: list[Path], out: Path, **more: Any) -> None:
    """Merge both ways; every tensor that transformers would save is there, bit for bit."""
    dtype = more.get("dtype")
    found = merge_folder(base, folders, out, **more)
    assert found.parity is not None
    assert found.parity.effect > 5 * found.parity.max_abs
    whole = merged_whole(cls, base, folders, None if dtype is None else getattr(torch, dtype))
    whole.save_pretrained(out.with_name("whole"))
    assert_same(tensors_in(out), tensors_in(out.with_name("whole")))
    config = json.loads((out / "config.json").read_text())
    assert config == json.loads((out.with_name("whole") / "config.json").read_text())


BASES: dict[str, tuple[Callable[[], Any], Any]] = {
    "llama": (tiny_llama, LLAMA),
    "tied llama": (lambda: tiny_llama(tied=True), LLAMA),
    "gpt2": (tiny_gpt2, GPT2),
    "bert": (tiny_bert, BERT),
}


@pytest.mark.parametrize(
    ("dtype", "shard"),
    [
        (torch.float32, "1GB"),
        (torch.bfloat16, "20kB"),
        (torch.float16, "20kB"),
        *(
            pytest.param(dtype, shard, marks=pytest.mark.slow)
            for dtype, shard in (
                (torch.float32, "20kB"),
                (torch.bfloat16, "1GB"),
                (torch.float16, "1GB"),
            )
        ),
    ],
)
@pytest.mark.parametrize("kind", BASES)
def test_every_kind_of_base(tmp_path: Path, kind: str, dtype: torch.dtype, shard: str) -> None:
    make, cls = BASES[kind]
    base = stored(make(), tmp_path / "base", dtype, shard)
    folder = adapter(cls, base, tmp_path / "a", LoRA(r=3))
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    same_as_whole(cls, base, [folder], tmp_path / "out")
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    weights = sorted(path.name for path in base.glob("*.safetensors*"))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors*")) == weights
    assert len(weights) > 3 or shard == "1GB"


def test_the_index_is_kept(tmp_path: Path) -> None:
    base = stored(tiny_llama(), tmp_path / "base", torch.bfloat16, "20kB")
    folder = adapter(LLAMA, base, tmp_path / "a", LoRA(r=2))
    merge_folder(base, [folder], tmp_path / "out")
    merge_folder(base, [folder], tmp_path / "wide", dtype="float32")
    name = "model.safetensors.index.json"
    index = json.loads((base / name).read_text())
    assert json.loads((tmp_path / "out" / name).read_text()) == index
    wide = json.loads((tmp_path / "wide" / name).read_text())
    assert wide["weight_map"] == index["weight_map"]
    assert wide["metadata"]["total_size"] == 2 * index["metadata"]["total_size"]
    assert wide["metadata"]["total_parameters"] == index["metadata"]["total_parameters"]


@pytest.mark.parametrize(
    ("source", "target"),
    [("float32", "bfloat16"), ("bfloat16", "float16"), ("bfloat16", "float32")],
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_another_dtype_is_rounded_to_once(
    tmp_path: Path, kind: str, source: str, target: str
) -> None:
    make, cls = BASES[kind]
    base = stored(make(), tmp_path / "base", getattr(torch, source), "20kB")
    folder = adapter(cls, base, tmp_path / "a", LoRA(r=3))
    same_as_whole(cls, base, [folder], tmp_path / "out", dtype=target)


METHODS_THAT_MERGE: dict[str, tuple[str, Method]] = {
    "patterns": ("llama", LoRA(r=2, rank_pattern={"q_proj": 5}, alpha_pattern={"v_proj": 3.0})),
    "rslora": ("llama", LoRA(r=4, scaling="alpha/sqrt(r)")),
    "parts and biases": ("gpt2", LoRA(r=2, targets=("c_attn:q,v",), bias="all")),
    "biases of the adapted": ("bert", LoRA(r=2, targets=("query",), bias="lora")),
    "pissa": ("llama", LoRA(r=2, start="pissa")),
    "dora": ("llama", LoRA(r=2, dora=True)),
    "dora, transposed": ("gpt2", LoRA(r=2, dora=True, targets=("c_attn", "c_proj"))),
    "factors in the base's dtype": ("llama", LoRA(r=2, dtype="base")),
    "vera": ("llama", METHODS["vera"](r=8)),  # type: ignore[call-arg]
    "a head trained whole": ("bert", LoRA(r=2, targets=("query",), train_whole=("classifier",))),
    "an untied head trained whole": ("llama", LoRA(r=2, train_whole=("lm_head",))),
    "bitfit": ("bert", METHODS["bitfit"]()),
    "linear probe": ("bert", METHODS["probe"]()),
    "full fine-tuning": ("gpt2", METHODS["full"]()),
    "intrinsic dimension": ("tied llama", METHODS["intrinsic"](d=40)),  # type: ignore[call-arg]
}


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", METHODS_THAT_MERGE)
def test_every_method_that_merges(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    kind, config = METHODS_THAT_MERGE[name]
    make, cls = BASES[kind]
    base = stored(make(), tmp_path / "base", dtype, "20kB")
    folder = adapter(cls, base, tmp_path / "a", config)
    same_as_whole(cls, base, [folder], tmp_path / "out")


def test_several_adapters_add_up(tmp_path: Path) -> None:
    base = stored(tiny_llama(), tmp_path / "base", torch.bfloat16, "20kB")
    configs = (LoRA(r=2), LoRA(r=3, targets=("v_proj", "lm_head")), LoRA(r=4, targets=("v_proj",)))
    folders = [
        adapter(LLAMA, base, tmp_path / f"a{number}", config, number)
        for number, config in enumerate(configs)
    ]
    same_as_whole(LLAMA, base, folders, tmp_path / "out")


def test_a_body_gets_its_head_and_its_prefix(tmp_path: Path) -> None:
    """The base's names lack `bert.`, and its folder has no classifier."""
    base = stored(tiny_bert().bert, tmp_path / "base", torch.float32, "20kB")  # type: ignore[union-attr]
    config = LoRA(r=2, targets=("query",), train_whole=("classifier",))
    folder = adapter(BERT, base, tmp_path / "a", config, num_labels=3)
    merge_folder(base, [folder], tmp_path / "out")
    whole = merged_whole(BERT, base, [folder], num_labels=3)
    whole.save_pretrained(tmp_path / "whole")
    assert_same(tensors_in(tmp_path / "out"), tensors_in(tmp_path / "whole"))
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == sorted(path.name for path in base.glob("*.safetensors"))


def test_names_of_old_checkpoints_are_transformers_business(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = stored(tiny_bert(), tmp_path / "base", torch.float32)
    tensors = load_file(base / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for name in list(tensors):
        for new, former in old.items():
            if name.endswith(new):
                tensors[name.removesuffix(new) + former] = tensors.pop(name)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    same_as_whole(BERT, base, [adapter(BERT, base, tmp_path / "a", LoRA(r=2))], tmp_path / "out")


def test_a_mixture_whose_experts_are_put_together_is_merged_whole(tmp_path: Path) -> None:
    torch.manual_seed(7)
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=64, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    cls = transformers.MixtralForCausalLM
    base = stored(cls(config), tmp_path / "base", torch.bfloat16, "20kB")
    assert any("experts.3.w1" in name for name in tensors_in(base))
    folder = adapter(cls, base, tmp_path / "a", LoRA(r=2, targets=("q_proj", "v_proj")))
    with pytest.warns(SidepathNotice, match="held in memory whole"):
        same_as_whole(cls, base, [folder], tmp_path / "out")


def test_layers_that_are_one_module_are_written_once(tmp_path: Path) -> None:
    torch.manual_seed(7)
    config = transformers.AlbertConfig(
        hidden_size=32, embedding_size=16, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    cls = transformers.AlbertForSequenceClassification
    base = stored(cls(config), tmp_path / "base", torch.bfloat16)
    same_as_whole(cls, base, [adapter(cls, base, tmp_path / "a", LoRA(r=2))], tmp_path / "out")


def t5(**more: Any) -> Any:
    torch.manual_seed(7)
    config = transformers.T5Config(
        d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, vocab_size=64,
        decoder_start_token_id=0, **more,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def test_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    cls = transformers.T5ForConditionalGeneration
    base = stored(t5(), tmp_path / "base", torch.bfloat16, "20kB")
    same_as_whole(cls, base, [adapter(cls, base, tmp_path / "a", LoRA(r=2))], tmp_path / "out")


@pytest.mark.parametrize("targets", [("embed_tokens",), ("lm_head",), ("lm_head", "embed_tokens")])
@pytest.mark.parametrize("shard", ["1GB", "10kB"])
def test_tied_embeddings_are_parted(tmp_path: Path, targets: Any, shard: str) -> None:
    base = stored(tiny_llama(tied=True), tmp_path / "base", torch.bfloat16, shard)
    folder = adapter(LLAMA, base, tmp_path / "a", LoRA(r=3, targets=targets))
    found = merge_folder(base, [folder], tmp_path / "out")
    assert found.parity is not None
    assert found.parity.effect > 5 * found.parity.max_abs
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    old, new = tensors_in(base), tensors_in(tmp_path / "out")
    assert set(new) == {*old, "lm_head.weight"}
    W0 = old["model.embed_tokens.weight"]
    model = LLAMA.from_pretrained(base, dtype=torch.float32)
    deltas: Any = load(model, folder, "x").deltas
    for path, delta in deltas.items():
        change = delta.B @ delta.A * (16 / 3)
        expected = (W0.float() + (change if path == "lm_head" else change.T)).bfloat16()
        torch.testing.assert_close(new[f"{path}.weight"], expected, rtol=2**-7, atol=1e-6)
    for path in {"lm_head", "model.embed_tokens"} - set(deltas):
        assert torch.equal(new[f"{path}.weight"], W0)
    merged = LLAMA.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    difference = (outputs(merged, IDS) - outputs(model, IDS)).abs().max()
    assert difference <= found.parity.tolerance


def test_the_tied_head_of_gpt2_is_parted(tmp_path: Path) -> None:
    base = stored(tiny_gpt2(), tmp_path / "base", torch.float32)
    folder = adapter(GPT2, base, tmp_path / "a", LoRA(r=3, targets=("wte",)))
    found = merge_folder(base, [folder], tmp_path / "out")
    assert found.parity is not None
    assert found.parity.max_abs < 1e-4 < found.parity.effect
    new = tensors_in(tmp_path / "out")
    assert torch.equal(new["lm_head.weight"], tensors_in(base)["transformer.wte.weight"])
    assert not torch.equal(new["lm_head.weight"], new["transformer.wte.weight"])


def test_tensors_that_no_config_parts_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = stored(tiny_llama(tied=True), tmp_path / "base", torch.float32)
    folder = adapter(LLAMA, base, tmp_path / "a", LoRA(r=2, targets=("embed_tokens",)))
    made = LLAMA.__init__

    def tying(self: Any, config: Any) -> None:
        made(self, config)
        self.lm_head.weight = self.model.embed_tokens.weight

    monkeypatch.setattr(LLAMA, "__init__", tying)
    with pytest.raises(TiedWeights, match=r"lm_head.weight are one tensor in every model"):
        merge_folder(base, [folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_with_layers_of_its_own_is_refused(tmp_path: Path) -> None:
    base = stored(tiny_llama(), tmp_path / "base", torch.float32)
    folder = adapter(LLAMA, base, tmp_path / "a", METHODS["bottleneck"]())
    with pytest.raises(MergeError, match="layers of its own"):
        merge_folder(base, [folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()
