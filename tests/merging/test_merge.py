"""Merged folders are plain models that give the adapters' outputs, or they are not published."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sidepath.errors import (
    ConfigError,
    DamagedAdapter,
    MergeError,
    ParityError,
    SidepathNotice,
    StoreError,
    WrongBase,
)
from sidepath.merging import contents
from sidepath.merging.merge import merge_folder
from sidepath.methods.lora import LoRA
from sidepath.store.adapter import inject, load
from tests.conftest import outputs, randomise, tiny_bert, tiny_gpt2, tiny_llama
from tests.faults import flip_bit

IDS = torch.tensor([[5, 9, 3, 17, 22], [1, 2, 3, 4, 5]])
HEAD = "lm_head.weight"


@pytest.fixture(autouse=True)
def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A Llama's folder in bfloat16, with a file that must be carried over and one that must not."""
    tiny_llama().bfloat16().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "special_tokens_map.json").write_text("{}")
    (tmp_path / "base" / "training_args.bin").write_bytes(b"no")
    return tmp_path / "base"


def plain(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def adapter(base: Path, folder: Path, config: LoRA, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    made = inject(plain(base), config, "x")
    randomise(made.parameters(), 0.2)
    return made.save(folder)


def unmerged(base: Path, folder: Path) -> Tensor:
    model = plain(base, dtype=torch.float32)
    load(model, folder, "x")
    return outputs(model, IDS)


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_a_merged_folder_is_plain_and_gives_the_adapters_outputs(
    tmp_path: Path, base: Path, dtype: str | None
) -> None:
    folder = adapter(base, tmp_path / "a", LoRA(r=4))
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    found = merge_folder(base, [folder], tmp_path / "out", dtype=dtype)
    assert found.parity is not None
    assert found.parity.effect > 10 * found.parity.max_abs
    merged = plain(tmp_path / "out", dtype=torch.float32)
    difference = (outputs(merged, IDS) - unmerged(base, folder)).abs().max()
    assert difference <= found.parity.tolerance
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert set(stored) == set(load_file(base / "model.safetensors"))
    expected = torch.bfloat16 if dtype is None else getattr(torch, dtype)
    assert {tensor.dtype for tensor in stored.values()} == {expected}
    assert (tmp_path / "out" / "special_tokens_map.json").exists()
    assert not (tmp_path / "out" / "training_args.bin").exists()
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    document = found.as_dict()
    assert document["output"] == str(tmp_path / "out")
    assert {"max_abs", "mean_abs", "top1", "kl"} <= set(document["parity"])


def test_the_weights_are_added_in_float32_and_rounded_once(tmp_path: Path, base: Path) -> None:
    folders = [adapter(base, tmp_path / f"a{seed}", LoRA(r=2), seed) for seed in range(3)]
    merge_folder(base, folders, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    old = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    updates = []
    for folder in folders:
        tensors = load_file(folder / "adapter_model.safetensors")
        A, B = (tensors[f"base_model.model.{name}.lora_{n}.weight"] for n in "AB")
        updates.append(B @ A * 8.0)
    expected = old[f"{name}.weight"].float() + torch.stack(updates).sum(0)
    assert torch.equal(stored[f"{name}.weight"], expected.bfloat16())
    assert torch.equal(stored["model.norm.weight"], old["model.norm.weight"])


def test_several_adapters_add_up(tmp_path: Path, base: Path) -> None:
    first = adapter(base, tmp_path / "a", LoRA(r=2, targets=("q_proj", "v_proj")), 1)
    second = adapter(base, tmp_path / "b", LoRA(r=3, targets=("v_proj", "down_proj")), 2)
    found = merge_folder(base, [first, second], tmp_path / "out", dtype="float32")
    assert found.parity is not None
    assert found.parity.max_abs < 1e-3 < found.parity.effect
    record = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert [entry["name"] for entry in record["adapters"]] == ["a", "b"]
    merged = plain(tmp_path / "out")
    for folder in (first, second):
        with pytest.raises(MergeError, match="merged into the base already"):
            load(merged, folder, allow_other_base=True)


def test_a_classifier_keeps_its_head_and_labels(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    tiny_bert().bert.save_pretrained(tmp_path / "base")  # type: ignore[union-attr, operator]
    labels = {0: "bad", 1: "good", 2: "odd"}
    options = {"num_labels": 3, "id2label": labels, "label2id": {v: k for k, v in labels.items()}}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **options).eval()
    config = LoRA(r=2, targets=("query",), bias="lora", train_whole=("classifier",))
    made = inject(model, config, "x")
    randomise(made.parameters(), 0.3)
    made.save(tmp_path / "a")
    found = merge_folder(tmp_path / "base", [tmp_path / "a"], tmp_path / "out")
    assert found.parity is not None
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert merged.config.id2label == labels
    assert torch.allclose(outputs(merged, IDS), outputs(model, IDS), atol=1e-5)


def test_two_heads_cannot_be_added_up(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    config = LoRA(r=2, targets=("query",), train_whole=("classifier",))
    for name in "ab":
        from transformers import AutoModelForSequenceClassification

        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        inject(model, config, "x").save(tmp_path / name)
    with pytest.raises(MergeError, match=r"(?s)train the same module whole.*classifier"):
        merge_folder(tmp_path / "base", [tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parts_of_gpt2_merge(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    folder = adapter(
        tmp_path / "base", tmp_path / "a", LoRA(r=2, targets=("c_attn:q,v",), bias="all")
    )
    merge_folder(tmp_path / "base", [folder], tmp_path / "out")
    difference = outputs(plain(tmp_path / "out"), IDS) - unmerged(tmp_path / "base", folder)
    assert difference.abs().max() <= 1e-5


def test_beyond_the_tolerance_nothing_is_published(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = adapter(base, tmp_path / "a", LoRA(r=4))
    made = contents._made

    def damaged(folded: Any, full: str, *rest: Any) -> Tensor:
        wrong = 0.5 if full == "model.layers.0.mlp.up_proj.weight" else 0.0
        return made(folded, full, *rest) + wrong

    monkeypatch.setattr(contents, "_made", damaged)
    with pytest.raises(ParityError, match="nothing was published") as caught:
        merge_folder(base, [folder], tmp_path / "out")
    assert caught.value.exit_code == 1
    assert sorted(os.listdir(tmp_path)) == ["a", "base"]
    with pytest.warns(SidepathNotice, match="PARITY NOT MEASURED"):
        found = merge_folder(base, [folder], tmp_path / "out", skip_parity=True)
    assert found.as_dict()["parity"] is None
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["skipped"] is True


def test_a_merged_folder_replaces_a_merged_folder_only(tmp_path: Path, base: Path) -> None:
    folder = adapter(base, tmp_path / "a", LoRA(r=2))
    merge_folder(base, [folder], tmp_path / "out")
    merge_folder(base, [folder], tmp_path / "out", dtype="float32")
    for place in (base, folder, adapter(base, tmp_path / "b", LoRA(r=2))):
        with pytest.raises(StoreError):
            merge_folder(base, [folder], place)
    with pytest.raises(StoreError, match="not ours to replace"):
        inject(plain(base), LoRA(r=2), "x").save(tmp_path / "out")


def test_what_is_wrong_is_said(tmp_path: Path, base: Path) -> None:
    folder = adapter(base, tmp_path / "a", LoRA(r=2))
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="no adapter"):
        merge_folder(base, [], out)
    with pytest.raises(ConfigError, match="unknown dtype"):
        merge_folder(base, [folder], out, dtype="int8")
    with pytest.raises(StoreError, match="no safetensors checkpoint"):
        merge_folder(tmp_path / "nowhere", [folder], out)
    with pytest.raises(StoreError, match="no adapter folder"):
        merge_folder(base, [tmp_path / "nowhere"], out)
    flip_bit(folder / "adapter_model.safetensors")
    with pytest.raises(DamagedAdapter):
        merge_folder(base, [folder], out)
    assert not out.exists()


def test_another_base_is_refused(tmp_path: Path, base: Path) -> None:
    folder = adapter(base, tmp_path / "a", LoRA(r=2))
    other = tiny_llama()
    randomise(other.parameters(), 0.1)
    other.save_pretrained(tmp_path / "other")  # type: ignore[operator]
    with pytest.raises(WrongBase):
        merge_folder(tmp_path / "other", [folder], tmp_path / "out")
    merge_folder(tmp_path / "other", [folder], tmp_path / "out", allow_other_base=True)


def test_a_plain_peft_adapter_merges(tmp_path: Path, base: Path) -> None:
    folder = adapter(base, tmp_path / "a", LoRA(r=2))
    expected = unmerged(base, folder)
    (folder / "sidepath.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SidepathNotice)
        merge_folder(base, [folder], tmp_path / "out", dtype="float32")
    assert torch.allclose(outputs(plain(tmp_path / "out"), IDS), expected, atol=1e-4)


def test_real_base(tmp_path: Path, stories: Path) -> None:
    folder = adapter(stories, tmp_path / "a", LoRA(r=8))
    found = merge_folder(stories, [folder], tmp_path / "out", calibration=["Once upon a time"])
    assert found.parity is not None
    assert found.parity.top1 == 1.0
    assert (tmp_path / "out" / "tokenizer.json").exists()


def without_manifest(folder: Path) -> Path:
    """The folder as PEFT saves one: nothing tells the base's fingerprint."""
    for name in ("sidepath.json", "README.md"):
        (folder / name).unlink()
    return folder


@pytest.mark.filterwarnings("ignore:.*its base could not be verified")
def test_a_base_that_lacks_weights_is_refused(tmp_path: Path, base: Path) -> None:
    """Transformers would draw them at random, alike in both models that parity compares."""
    folder = without_manifest(adapter(base, tmp_path / "a", LoRA(r=2)))
    held = load_file(base / "model.safetensors")
    lost = {name: t for name, t in held.items() if name not in ("model.norm.weight", HEAD)}
    save_file(lost, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StoreError) as caught:
        merge_folder(base, [folder], tmp_path / "out")
    assert caught.value.faults == [HEAD, "model.norm.weight"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [{"architectures": [{}]}, {"architectures": "LlamaForCausalLM"}, {"num_hidden_layers": 2**31}],
)
def test_a_config_that_names_no_model(tmp_path: Path, base: Path, change: dict[str, Any]) -> None:
    folder = without_manifest(adapter(base, tmp_path / "a", LoRA(r=2)))
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(StoreError):
        merge_folder(base, [folder], tmp_path / "out")


def test_a_base_with_bytes_that_belong_to_nothing(tmp_path: Path, base: Path) -> None:
    """The safetensors library would map all of it into memory."""
    folder = adapter(base, tmp_path / "a", LoRA(r=2))
    os.truncate(base / "model.safetensors", 2**40)
    with pytest.raises(DamagedAdapter, match="after the last tensor"):
        merge_folder(base, [folder], tmp_path / "out")


def test_nothing_is_written_into_a_folder_that_is_read(tmp_path: Path, base: Path) -> None:
    folder = adapter(base, tmp_path / "a", LoRA(r=2))
    for output in (folder, folder / "merged", base / "merged"):
        with pytest.raises(StoreError, match="lies in one"):
            merge_folder(base, [folder], output)
    assert not (folder / "merged").exists()
    assert not (base / "merged").exists()
