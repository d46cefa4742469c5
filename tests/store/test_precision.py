"""Merging over 4-bit bases: into the dequantised one, and what quantising again would leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sidepath.core.quant import nearest_levels
from sidepath.errors import MergeError, MissingExtra, WrongBase
from sidepath.injection.surgery import remove
from sidepath.merging.merge import merge_folder
from sidepath.methods.lora import LoRA
from sidepath.store.adapter import inject, load
from sidepath.store.precision import Survival, survival, together
from tests.conftest import outputs, randomise, tiny_gpt2, tiny_llama
from tests.store.quantised import packed, plain, stored

IDS = torch.tensor([[5, 9, 3, 17, 22], [1, 2, 3, 4, 5]])
NAME = "model.layers.1.mlp.up_proj"


@pytest.fixture(autouse=True)
def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def adapter(model: Any, folder: Path, seed: int = 0, size: float = 0.1) -> Path:
    torch.manual_seed(seed)
    made = inject(model, LoRA(r=4), "x")
    randomise(made.parameters(), size)
    made.save(folder)
    remove(model, "x")
    return folder


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("from_packed_folder", [True, False])
def test_the_merged_folder_is_plain_and_gives_the_adapters_outputs(
    tmp_path: Path, make: Any, from_packed_folder: bool
) -> None:
    base = stored(make(), tmp_path / "base")
    model = packed(base, "float32")
    folder = adapter(model, tmp_path / "a")
    source = stored(model, tmp_path / "packed") if from_packed_folder else base
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    found = merge_folder(source, [folder], tmp_path / "out", dtype="float32")
    assert found.parity is not None
    assert found.parity.max_abs < 1e-4 < found.parity.effect
    assert found.as_dict()["dequantised"] == len(
        [key for key in load_file(tmp_path / "a" / "adapter_model.safetensors") if "lora_A" in key]
    )
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not any("quant" in key for key in settings)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert set(tensors) == set(load_file(base / "model.safetensors"))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    load(model, folder, "x")
    torch.testing.assert_close(
        outputs(plain(tmp_path / "out"), IDS), outputs(model, IDS), atol=1e-4, rtol=1e-4
    )
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_the_weights_are_added_to_the_dequantised_ones(tmp_path: Path) -> None:
    """Rounded once: to the base's dtype, or to the one it was quantised from."""
    base = stored(tiny_llama(), tmp_path / "base")
    folder = adapter(packed(base), tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{NAME}.lora_{n}.weight"] for n in "AB")
    W = load_file(base / "model.safetensors")[f"{NAME}.weight"]
    expected = nearest_levels(W.bfloat16()) + B @ A * 4.0
    merge_folder(base, [folder], tmp_path / "out")
    torch.testing.assert_close(
        load_file(tmp_path / "out" / "model.safetensors")[f"{NAME}.weight"], expected,
        atol=1e-7, rtol=1e-6,
    )  # fmt: skip
    merge_folder(stored(packed(base), tmp_path / "q"), [folder], tmp_path / "out")
    again = load_file(tmp_path / "out" / "model.safetensors")[f"{NAME}.weight"]
    assert again.dtype == torch.bfloat16
    torch.testing.assert_close(again.float(), expected, atol=1e-6, rtol=2**-8)


def test_an_adapter_of_the_plain_base_merges_into_the_packed_one(tmp_path: Path) -> None:
    base = stored(tiny_llama(), tmp_path / "base")
    folder = adapter(plain(base), tmp_path / "a")
    source = stored(packed(base, "float32"), tmp_path / "q")
    assert merge_folder(source, [folder], tmp_path / "out").dequantised == 14
    assert merge_folder(base, [folder], tmp_path / "out").dequantised == 0
    model = packed(base, "float32")
    load(model, folder, "x")
    merge_folder(source, [folder], tmp_path / "out")
    torch.testing.assert_close(
        outputs(plain(tmp_path / "out"), IDS), outputs(model, IDS), atol=1e-4, rtol=1e-4
    )


def test_the_base_is_checked_before_it_is_dequantised(tmp_path: Path) -> None:
    base = stored(tiny_llama(), tmp_path / "base")
    folder = adapter(packed(base), tmp_path / "a")
    other = tiny_llama()
    randomise(other.parameters())
    for form in (other, packed(stored(other, tmp_path / "other"))):
        source = stored(form, tmp_path / "source")
        with pytest.raises(WrongBase):
            merge_folder(source, [folder], tmp_path / "out")
        merge_folder(source, [folder], tmp_path / "out", allow_other_base=True)


def test_adapters_of_two_precisions_have_no_one_base(tmp_path: Path) -> None:
    base = stored(tiny_llama(), tmp_path / "base")
    folders = [adapter(packed(base), tmp_path / "a"), adapter(plain(base), tmp_path / "b", 1)]
    with pytest.raises(MergeError, match=r"(?s)different precisions.*NF4-BF16-64-256.*not quant"):
        merge_folder(base, folders, tmp_path / "out")
    same = [folders[0], adapter(packed(base), tmp_path / "c", 2)]
    assert merge_folder(base, same, tmp_path / "out").dequantised == 14


def test_a_packed_folder_needs_bitsandbytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    base = stored(tiny_llama(), tmp_path / "base")
    folder = adapter(plain(base), tmp_path / "a")
    source = stored(packed(base), tmp_path / "q")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match="sidepath"):
        merge_folder(source, [folder], tmp_path / "out")


# -- what quantising again would leave ----------------------------------------------------------


def test_survival_by_its_definition() -> None:
    W, change = torch.randn(6, 64), torch.randn(6, 64) * 0.3
    whole = survival("l", W, change, lambda M: M)
    assert whole.as_dict() == {
        "name": "l", "share": pytest.approx(1.0), "relative_error": pytest.approx(0, abs=1e-6)
    }  # fmt: skip
    nothing = survival("l", W, change, lambda M: M * 0)
    assert nothing.as_dict() == {"name": "l", "share": 0.0, "relative_error": pytest.approx(1.0)}
    half = survival("l", W, change, lambda M: M / 2)
    assert half.as_dict()["share"] == pytest.approx(0.5)
    kept = (nearest_levels(W + change) - nearest_levels(W)).double()
    found = survival("l", W, change, nearest_levels).as_dict()
    size = change.double().square().sum()
    assert found["share"] == pytest.approx(float((kept * change).sum() / size))
    error = (kept - change).square().sum() / size
    assert found["relative_error"] == pytest.approx(float(error.sqrt()))


def test_no_update_has_no_share() -> None:
    none = Survival("l", 0.0, 0.0, 0.0)
    assert none.as_dict() == {"name": "l", "share": None, "relative_error": None}
    both = together([none, Survival("m", 2.0, 1.0, 4.0)])
    assert (both["share"], both["relative_error"]) == (0.5, 0.5)
    assert [layer["name"] for layer in both["layers"]] == ["l", "m"]


def test_small_updates_are_lost_when_quantised_again(tmp_path: Path) -> None:
    """On the grid of the dequantised base, an update under half a step moves no code."""
    base = stored(tiny_llama(), tmp_path / "base")
    found = {}
    for size in (0.0003, 0.5):
        folder = adapter(packed(base), tmp_path / f"a{size}", size=size)
        document = merge_folder(base, [folder], tmp_path / "out", requantise="nf4").as_dict()
        found[size] = document["requantised"]
        assert len(found[size]["layers"]) == 14
        assert found[size]["layers"][0]["name"] == "model.layers.0.self_attn.q_proj"
    assert found[0.5]["share"] == pytest.approx(1, abs=0.05)
    assert found[0.5]["relative_error"] < 0.2
    assert found[0.0003]["share"] < 0.1
    assert found[0.0003]["relative_error"] > 0.9
    assert "requantised" not in merge_folder(base, [folder], tmp_path / "out").as_dict()
