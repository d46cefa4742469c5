"""Biases and modules trained whole: exact, or refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import sidepath
from sidepath import Combination, combine
from sidepath.combining.elements import put_together
from sidepath.errors import StoreError
from tests.combining.kit import doubled, saved
from tests.conftest import tiny_bert

MAKE = doubled(tiny_bert)
QUERY, NORM = "bert.encoder.layer.0.attention.self.query", "bert.embeddings.LayerNorm"


def two(folder: Path) -> list[Path]:
    """Both train all biases and the head; one adapts another layer beside."""
    common = {"r": 2, "bias": "all", "train_whole": ("classifier",), "dtype": "base"}
    return [
        saved(folder / "one", 1, MAKE, targets=("query",), **common),
        saved(folder / "two", 2, MAKE, targets=("query", "key"), **common),
    ]


def held(folder: Path) -> dict[str, Tensor]:
    """Biases and whole tensors as a model that loaded the adapter holds them."""
    adapter = sidepath.load(MAKE(), folder, "it")
    found = {}
    for path, delta in adapter.deltas.items():
        for local, tensor in delta.tensors().items():
            if local not in ("A", "B"):
                found[f"{path}.{local}"] = tensor.detach()
    return found


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.5, -0.5)])
def test_weights_that_sum_to_1_need_no_base(tmp_path: Path, weights: tuple[float, ...]) -> None:
    folders = two(tmp_path)
    combine(folders, tmp_path / "both", Combination(weights=weights))
    one, other = map(held, folders)
    found = held(tmp_path / "both")
    assert set(found) == set(one) == set(other)
    assert f"{NORM}.bias" in found
    assert "classifier.weight" in found
    for name, tensor in found.items():
        expected = weights[0] * one[name] + weights[1] * other[name]
        torch.testing.assert_close(tensor, expected, atol=1e-12, rtol=1e-12)


def test_other_weights_need_it(tmp_path: Path) -> None:
    folders = two(tmp_path)
    MAKE().save_pretrained(tmp_path / "base")
    recipe = Combination(weights=(1.0, -0.5))
    with pytest.raises(StoreError, match=r"(?s)sum to 0.5.*give the base") as caught:
        combine(folders, tmp_path / "both", recipe)
    named = [fault.partition(":")[0] for fault in caught.value.faults]
    assert {"classifier.weight", f"{NORM}.bias", f"{QUERY}.bias"} <= set(named), "all at once"
    assert not (tmp_path / "both").exists()
    combine(folders, tmp_path / "both", recipe, base=tmp_path / "base")
    base = MAKE().state_dict()
    one, other = map(held, folders)
    for name, tensor in held(tmp_path / "both").items():
        expected = base[name] + (one[name] - base[name]) - 0.5 * (other[name] - base[name])
        torch.testing.assert_close(tensor, expected, atol=1e-12, rtol=1e-12)


def test_elementwise_kinds_compare_the_changes(tmp_path: Path) -> None:
    folders = two(tmp_path)
    MAKE().save_pretrained(tmp_path / "base")
    recipe = Combination(kind="ties", r=4, density=0.5, weights=(0.5, 0.5))
    with pytest.raises(StoreError, match="ties compares changes"):
        combine(folders, tmp_path / "both", recipe)
    combine(folders, tmp_path / "both", recipe, base=tmp_path / "base")
    base = MAKE().state_dict()
    one, other = map(held, folders)
    for name, tensor in held(tmp_path / "both").items():
        changes = [0.5 * (held_one[name] - base[name]) for held_one in (one, other)]
        expected = base[name] + put_together(changes, "ties", 0.5, ())
        torch.testing.assert_close(tensor, expected, atol=1e-12, rtol=1e-12)


def test_an_adapter_that_trains_no_biases_beside_one_that_does(tmp_path: Path) -> None:
    folders = [
        saved(tmp_path / "with", 1, MAKE, r=2, bias="lora", targets=("query",), dtype="base"),
        saved(tmp_path / "without", 2, MAKE, r=2, targets=("key",), dtype="base"),
    ]
    MAKE().save_pretrained(tmp_path / "base")
    with pytest.raises(StoreError, match=r"key.bias: one adapter trains biases"):
        combine(folders, tmp_path / "both")
    combine(folders, tmp_path / "both", base=tmp_path / "base")
    found, base = held(tmp_path / "both"), MAKE().state_dict()
    for name, tensor in found.items():
        expected = base[name] if "key" in name else held(folders[0])[name]
        assert torch.equal(tensor, expected)


def test_a_module_at_weight_0_is_the_bases_own(tmp_path: Path) -> None:
    folders = two(tmp_path)
    recipe = Combination(weights=(0.5, 0.5), layer_weights={"classifier": (0.0, 0.0)})
    combine(folders, tmp_path / "both", recipe)
    assert not [name for name in held(tmp_path / "both") if "classifier" in name]


def test_a_head_that_the_base_lacks(tmp_path: Path) -> None:
    from transformers import BertModel

    folders = two(tmp_path)
    model = MAKE()
    body = model.get_submodule("bert")
    assert isinstance(body, BertModel)
    body.save_pretrained(tmp_path / "body")
    recipe = Combination(weights=(1.0, 1.0))
    with pytest.raises(StoreError, match=r"classifier.weight.*the base holds no such tensor"):
        combine(folders, tmp_path / "both", recipe, base=tmp_path / "body")
