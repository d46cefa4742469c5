"""What cannot be combined: every reason at once, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sidepath import Combination, Extraction, combine
from sidepath.convert.formats import convert
from sidepath.errors import ConfigError, DamagedAdapter, SidepathError, StoreError, WrongBase
from sidepath.methods.plain import BitFit
from sidepath.store.adapter import inject
from tests.combining.kit import saved
from tests.conftest import tiny_bert, tiny_llama
from tests.faults import flip_bit
from tests.fuzz.adapters import resign_manifest


def other_llama() -> Any:
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    return model


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "tise", "r": 1}, 'did you mean "ties"'),
        ({"kind": "svd"}, "svd needs a rank"),
        ({"kind": "ties"}, "ties needs a rank"),
        ({"r": 4}, "concatenate keeps every rank"),
        ({"kind": "svd", "r": 0}, "r = 0"),
        ({"kind": "svd", "energy": 1.5}, "energy = 1.5"),
        ({"kind": "svd", "energy": 0.0}, "energy = 0.0"),
        ({"kind": "dare", "r": 2, "density": 0.0}, "density = 0.0"),
        ({"kind": "dare", "r": 2, "density": 1.1}, "density = 1.1"),
        ({"kind": "svd", "r": 2, "density": 0.5}, "density says nothing to svd"),
        ({"weights": (1.0, float("nan"))}, "weights = "),
        ({"weights": (float("inf"),)}, "weights = "),
        ({"weights": ()}, "weights = "),
        ({"layer_weights": {"q_proj": (float("nan"),)}}, "layer_weights"),
    ],
)
def test_recipes(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Combination(**settings)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "needs a rank"),
        ({"r": 0}, "r = 0"),
        ({"energy": 2.0}, "energy = 2.0"),
        ({"r": 1, "targets": ()}, "targets"),
        ({"r": 1, "targets": ("c_attn:q",)}, "whole matrices"),
    ],
)
def test_extractions(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Extraction(**settings)
    assert said in str(caught.value)


def refused(folders: list[Path], out: Path, *said: str, **more: Any) -> SidepathError:
    with pytest.raises(SidepathError) as caught:
        combine(folders, out, Combination(**more))
    assert [text for text in said if text not in str(caught.value)] == [], str(caught.value)
    return caught.value


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    folders = [saved(tmp_path / name, n, r=2) for n, name in enumerate(("a", "b"))]
    error = refused(
        folders,
        tmp_path / "out",
        "weights: 3 weights for 2 adapters",
        '"q_proj": 1 weights for 2 adapters',
        '"*.q_prj" matches none of',
        "q_proj",
        weights=(1.0, 1.0, 1.0),
        layer_weights={"q_proj": (1.0,), "*.q_prj": (1.0, 1.0)},
    )
    assert isinstance(error, ConfigError)
    refused(folders, tmp_path / "out", "leave no update", weights=(0.0, 0.0))
    assert not (tmp_path / "out").exists()


def test_places(tmp_path: Path) -> None:
    one = saved(tmp_path / "a", 1, r=2)
    before = {path: path.read_bytes() for path in one.iterdir()}
    (tmp_path / "link").symlink_to(one)
    refused([], tmp_path / "out", "no adapter to combine")
    for out in (one, tmp_path / "link", one / "inside"):
        refused([one], out, "one of the folders that are read")
    assert {path: path.read_bytes() for path in one.iterdir()} == before


def test_damaged_and_absent_folders_all_at_once(tmp_path: Path) -> None:
    damaged = saved(tmp_path / "damaged", 1, r=2)
    flip_bit(damaged / "adapter_model.safetensors")
    empty = tmp_path / "empty"
    empty.mkdir()
    error = refused([damaged], tmp_path / "out", "adapter_model.safetensors")
    assert isinstance(error, DamagedAdapter)
    good = saved(tmp_path / "good", 2, r=2)
    refused(
        [damaged, good, empty, tmp_path / "absent"],
        tmp_path / "out",
        "3 adapters cannot be read",
        "damaged: ",
        "empty: the folder holds no adapter",
        "absent: there is no adapter folder",
    )


def test_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    refused([folder], tmp_path / "out", "pickle files are never loaded")


def test_a_method_without_factors(tmp_path: Path) -> None:
    inject(tiny_bert(), BitFit(), "biases").save(tmp_path / "biases")
    refused([tmp_path / "biases"], tmp_path / "out", "bitfit has no low-rank updates")


def test_other_bases(tmp_path: Path) -> None:
    folders = [saved(tmp_path / "a", 1, r=2), saved(tmp_path / "b", 2, other_llama, r=2)]
    error = refused(folders, tmp_path / "out", "not made for one base", "b, held against a: ")
    assert isinstance(error, WrongBase)
    combine(folders, tmp_path / "out", allow_other_base=True)
    tiny_llama().save_pretrained(tmp_path / "base")
    other_llama().save_pretrained(tmp_path / "other")
    combine(folders[:1], tmp_path / "right", base=tmp_path / "base")
    with pytest.raises(WrongBase, match=r"a: model\.embed_tokens\.weight: other values"):
        combine(folders[:1], tmp_path / "wrong", base=tmp_path / "other")


def test_what_makes_no_sense_together(tmp_path: Path) -> None:
    """Over other bases, so that shapes and kinds of places can differ: all said at once."""
    folders = [
        saved(tmp_path / "a", 1, r=2, targets=("q_proj", "lm_head")),
        saved(tmp_path / "b", 2, lambda: tiny_llama(vocab=80), r=2, train_whole=("q_proj",)),
        saved(tmp_path / "c", 3, lambda: tiny_llama(vocab=80), r=2, targets=("lm_head",)),
    ]
    with pytest.raises(StoreError) as caught:
        combine(folders, tmp_path / "out", allow_other_base=True)
    text = str(caught.value)
    assert "lm_head: the update is [64, 32] in a, [80, 32] in c" in text
    assert "layers.0.self_attn.q_proj: trained whole in b" in text
    assert not (tmp_path / "out").exists()


def test_labels_and_classes(tmp_path: Path) -> None:
    folders = [
        saved(tmp_path / "two", 1, tiny_bert, r=2, targets=("query",)),
        saved(tmp_path / "three", 2, lambda: tiny_bert(3), r=2, targets=("query",)),
        saved(tmp_path / "llama", 3, r=2),
    ]
    with pytest.raises(StoreError) as caught:
        combine(folders, tmp_path / "out", allow_other_base=True)
    assert "three and two have other labels" in str(caught.value)
    assert "llama is of a LlamaForCausalLM, three of a BertForSequenceClassification" in str(
        caught.value
    )


def test_settings_that_are_broken_beside_a_manifest(tmp_path: Path) -> None:
    """They are listed there by their digest, and broken all the same."""
    folder = saved(tmp_path / "a", 1, r=2)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files = resign_manifest({**files, "adapter_config.json": b"{"})
    for name, data in files.items():
        (folder / name).write_bytes(data)
    with pytest.raises(DamagedAdapter, match=r"adapter_config\.json: not JSON"):
        combine([folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_manifest_that_does_not_list_the_weights(tmp_path: Path) -> None:
    """Then nobody knows their digest."""
    folder = saved(tmp_path / "a", 1, r=2)
    values = json.loads((folder / "sidepath.json").read_bytes())
    del values["files"]["adapter_model.safetensors"]
    signed = resign_manifest({"sidepath.json": json.dumps(values).encode()})["sidepath.json"]
    (folder / "sidepath.json").write_bytes(signed)
    with pytest.raises(DamagedAdapter, match=r"adapter_model\.safetensors: not listed"):
        combine([folder], tmp_path / "out")
    with pytest.raises(DamagedAdapter, match=r"adapter_model\.safetensors: not listed"):
        convert(folder, tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()
