"""Adapters out of two checkpoints: what was planted is found, and the tuned model comes back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sidepath
from sidepath import Extraction, extract
from sidepath.combining import checkpoints
from sidepath.errors import SidepathError, StoreError, TargetNotFound, WrongBase
from sidepath.store import stored
from sidepath.store.loading import load_tensors
from sidepath.store.manifest import trusted_manifest
from tests.combining.kit import COMMIT, IDS, added, logits, saved, snapshot, updates
from tests.conftest import outputs, tiny_bert, tiny_gpt2, tiny_llama

Make = Callable[[], Any]


def folder_of(model: nn.Module, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)  # type: ignore[operator]
    return folder


def planted(tmp_path: Path, make: Make, **settings: Any) -> tuple[Path, Path, dict[str, Tensor]]:
    """A base's folder, that of a model with an adapter's updates added, and the updates."""
    source = saved(tmp_path / "planted", 1, make, **settings)
    changes = updates(source, make)
    return (
        folder_of(make(), tmp_path / "base"),
        folder_of(added(make, changes), tmp_path / "tuned"),
        changes,
    )


CASES: dict[str, tuple[Make, dict[str, Any], dict[str, Any]]] = {
    "llama": (tiny_llama, {"r": 4, "alpha": 8}, {"r": 4}),
    "by energy": (tiny_llama, {"r": 3, "alpha": 6}, {"energy": 1 - 1e-10}),
    "Conv1D": (tiny_gpt2, {"r": 4, "alpha": 8}, {"r": 4}),
    "square Conv1D": (
        tiny_gpt2,
        {"r": 3, "targets": ("attn.c_proj",)},
        {"r": 3, "targets": ("attn.c_proj",)},
    ),
    "embedding and head": (
        tiny_llama,
        {"r": 2, "targets": ("embed_tokens", "lm_head")},
        {"r": 2, "targets": ("embed_tokens", "lm_head")},
    ),
    "ranks that differ": (
        tiny_llama,
        {"r": 4, "rank_pattern": {"v_proj": 2, "layers.1.*": 1}},
        {"r": 6, "energy": 1 - 1e-10},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_planted_adapter_is_recovered(tmp_path: Path, name: str) -> None:
    make, settings, how = CASES[name]
    base, tuned, changes = planted(tmp_path, make, **settings)
    found = extract(base, tuned, tmp_path / "out", Extraction(**how))
    again = updates(tmp_path / "out", make)
    assert set(again) == set(changes)
    for layer in found.layers:
        wanted = changes[layer["name"]]
        error = float((again[layer["name"]] - wanted).norm())
        assert error < 1e-4 * float(wanted.norm())
        assert layer["norm"] == pytest.approx(float(wanted.norm()), rel=1e-4)
        assert layer["relative_error"] < 1e-4
    assert found.relative_error < 1e-4
    assert (found.others, found.unknown) == ([], [])
    if "energy" in how:
        ranks = {layer["name"]: layer["r"] for layer in found.layers}
        exact = {path: int(torch.linalg.matrix_rank(dW)) for path, dW in changes.items()}
        assert ranks == exact
    expected = outputs(added(make, changes), IDS)
    moved = float((expected - outputs(make(), IDS)).abs().max())
    assert float((logits(make, tmp_path / "out") - expected).abs().max()) < 1e-4 * moved


def test_the_error_is_the_distance_to_the_tuned_weights(tmp_path: Path) -> None:
    base, tuned, changes = planted(tmp_path, tiny_llama, r=6, alpha=12)
    found = extract(base, tuned, tmp_path / "out", Extraction(r=2))
    again = updates(tmp_path / "out")
    for layer in found.layers:
        wanted = changes[layer["name"]]
        error = float((again[layer["name"]] - wanted).norm())
        assert error == pytest.approx(layer["error"], rel=1e-4)
        assert error == pytest.approx(float(torch.linalg.svdvals(wanted)[2:].norm()), rel=1e-4)


def test_sharded_bfloat16_checkpoints(tmp_path: Path) -> None:
    def make() -> Any:
        return tiny_llama().bfloat16()

    source = saved(tmp_path / "planted", 1, r=4, alpha=64)
    base = folder_of(make(), tmp_path / "base", max_shard_size="20KB")
    tuned = folder_of(added(make, updates(source)), tmp_path / "tuned", max_shard_size="30KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    found = extract(base, tuned, tmp_path / "out", Extraction(r=16))
    one, other = (tiny_llama_of(folder) for folder in (base, tuned))
    for name, update in updates(tmp_path / "out", make).items():
        wanted = other[f"{name}.weight"].double() - one[f"{name}.weight"].double()
        layer = next(layer for layer in found.layers if layer["name"] == name)
        assert float((update - wanted).norm()) == pytest.approx(layer["error"], rel=1e-3, abs=1e-6)


def tiny_llama_of(folder: Path) -> dict[str, Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def tuned_everywhere(make: Make) -> Any:
    """Every parameter moved: low-rank matrices are not all there is."""
    model = make()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    "make",
    [tiny_llama, lambda: tiny_llama(tied=True), tiny_gpt2, tiny_bert],
    ids=["llama", "tied", "gpt2", "bert"],
)
def test_what_is_no_target_is_told_and_saved_whole_if_asked(tmp_path: Path, make: Make) -> None:
    tuned_model = tuned_everywhere(make)
    base = folder_of(make(), tmp_path / "base")
    tuned = folder_of(tuned_model, tmp_path / "tuned")
    found = extract(base, tuned, tmp_path / "low", Extraction(r=64))
    own, theirs = make().state_dict(), tuned_model.state_dict()
    listed = {one["name"]: one for one in found.others}
    targets = {f"{layer['name']}.weight" for layer in found.layers}
    assert set(listed) == set(own) - targets, "all parameters are targets or listed"
    for name, one in listed.items():
        change = float((theirs[name].double() - own[name].double()).norm())
        assert one["change"] == pytest.approx(change, rel=1e-5)
        assert one["norm"] == pytest.approx(float(own[name].double().norm()), rel=1e-5)
        assert (one["saved"], one["only_in"]) == (False, None)
    whole = extract(base, tuned, tmp_path / "whole", Extraction(r=64, whole=True))
    assert all(one["saved"] for one in whole.others)
    expected = outputs(tuned_model, IDS)
    moved = float((expected - outputs(make(), IDS)).abs().max())
    assert float((logits(make, tmp_path / "whole") - expected).abs().max()) < 1e-4 * moved
    assert float((logits(make, tmp_path / "low") - expected).abs().max()) > 1e-2 * moved


def test_a_head_that_the_base_lacks(tmp_path: Path) -> None:
    from transformers import BertModel

    body = tiny_bert(3).get_submodule("bert")
    assert isinstance(body, BertModel)
    base = folder_of(body, tmp_path / "base")
    tuned_model = tuned_everywhere(lambda: tiny_bert(3))
    tuned = folder_of(tuned_model, tmp_path / "tuned")
    found = extract(base, tuned, tmp_path / "out", Extraction(r=64, whole=True))
    heads = [one for one in found.others if one["only_in"] == "tuned"]
    assert {one["name"] for one in heads} == {"classifier.weight", "classifier.bias"}
    assert all(one["saved"] and one["change"] is None for one in heads)
    model = tiny_bert(3)
    sidepath.load(model, tmp_path / "out")
    torch.testing.assert_close(outputs(model, IDS), outputs(tuned_model, IDS), atol=1e-4, rtol=1e-3)


def test_a_base_with_the_old_names_of_norms(tmp_path: Path) -> None:
    """`bert-base-uncased` is stored so."""
    base = folder_of(tiny_bert(), tmp_path / "base")
    tuned = folder_of(tuned_everywhere(tiny_bert), tmp_path / "tuned")
    tensors = load_file(base / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for name in list(tensors):
        for new, before in old.items():
            if name.endswith(new):
                tensors[name.replace(new, before)] = tensors.pop(name)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    found = extract(base, tuned, tmp_path / "out", Extraction(r=2))
    assert found.unknown == []
    assert not [one for one in found.others if one["only_in"]]
    sidepath.load(tiny_bert(), tmp_path / "out")


def test_only_its_own_base_takes_it(tmp_path: Path) -> None:
    base, tuned, changes = planted(tmp_path, tiny_llama, r=2, targets=("q_proj",))
    found = extract(base, tuned, tmp_path / "out", Extraction(r=2), record={"command": "typed"})
    assert len(found.unchanged) == 14 - len(changes)
    adapter = sidepath.load(tiny_llama(), tmp_path / "out")
    assert adapter.record["extracted"]["tuned"]["name"] == "tuned"
    assert adapter.record["command"] == "typed"
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["r"] == 2
    assert len(settings["target_modules"]) == 2
    with pytest.raises(WrongBase):
        sidepath.load(tuned_everywhere(tiny_llama), tmp_path / "out")
    fresh = sidepath.inject(tiny_llama(), adapter.config, "fresh")
    assert set(fresh.deltas) == set(changes), "its settings name the same places"


def test_one_pair_of_tensors_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned, _ = planted(tmp_path, tiny_llama, r=2)
    asked: list[int] = []

    def counted(path: Path, header: Any) -> Any:
        asked.append(len(header))
        return load_tensors(path, header)

    monkeypatch.setattr(stored, "load_tensors", counted)
    extract(base, tuned, tmp_path / "out", Extraction(r=2))
    assert set(asked) == {1}
    assert len(asked) == 2 * len(tiny_llama().state_dict()), "each tensor once"


def test_the_seed_decides_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidepath.combining.dense.EXACT", 0)
    base, tuned, _ = planted(tmp_path, tiny_llama, r=2)
    extract(base, tuned, tmp_path / "one", Extraction(r=2))
    torch.manual_seed(99)
    extract(base, tuned, tmp_path / "two", Extraction(r=2))
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def refused(base: Path, tuned: Path, out: Path, **how: Any) -> SidepathError:
    with pytest.raises(SidepathError) as caught:
        extract(base, tuned, out, Extraction(**{"r": 2, **how}))
    assert not out.exists()
    return caught.value


def test_refused(tmp_path: Path) -> None:
    base, tuned, _ = planted(tmp_path, tiny_llama, r=2)
    out = tmp_path / "out"
    wider = folder_of(tiny_llama(vocab=80), tmp_path / "wider")
    error = refused(base, wider, out)
    assert len(error.faults) == 2
    assert all("shape [64, 32] in the base, expected [80, 32]" in one for one in error.faults)
    assert "do not differ in any target" in str(refused(base, base, out))
    assert "one of the folders that are read" in str(refused_in_place(base, tuned))
    assert isinstance(refused(base, tuned, out, targets=("q_projj",)), TargetNotFound)
    tensors = load_file(tuned / "model.safetensors")
    for change, said in (
        ({"model.layers.0.mlp.up_proj.weight": None}, "up_proj.weight: not in both"),
        ({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}, "no floating numbers"),
        ({"lm_head.weight": torch.full((64, 32), torch.nan)}, "NaN or Inf"),
    ):
        changed = {key: t for key, t in {**tensors, **change}.items() if t is not None}
        other = folder_of(tiny_llama(), tmp_path / "changed")
        save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
        assert said in str(refused(base, other, out, targets=("all-linear", "lm_head")))
    pickled = folder_of(tiny_llama(), tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "pickle files are never loaded" in str(refused(base, pickled, out))


def refused_in_place(base: Path, tuned: Path) -> StoreError:
    with pytest.raises(StoreError) as caught:
        extract(base, tuned, tuned, Extraction(r=2))
    return caught.value


def test_stored_tensors_without_a_place_are_named(tmp_path: Path) -> None:
    base, tuned, _ = planted(tmp_path, tiny_llama, r=2)
    tensors = load_file(tuned / "model.safetensors")
    tensors["stray.weight"] = torch.zeros(2)
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    found = extract(base, tuned, tmp_path / "out", Extraction(r=2))
    assert found.unknown == ["stray.weight"]
    assert checkpoints.Pair(tiny_llama(), base, tuned).unknown() == ["stray.weight"]


def test_checkpoints_of_the_hub_are_named_by_their_repositories(tmp_path: Path) -> None:
    base, tuned, _ = planted(tmp_path, tiny_llama, r=2)
    cache = {"base": base, "tuned": tuned}
    for name, folder in cache.items():
        cache[name] = snapshot(tmp_path, name)
        folder.rename(cache[name])
    made = extract(cache["base"], cache["tuned"], tmp_path / "out", Extraction(r=2)).output
    manifest = trusted_manifest(made)
    assert (manifest.base_name, manifest.base_revision) == ("me/base", COMMIT)
    assert manifest.record["extracted"]["tuned"]["hub"] == f"hub:me/tuned@{COMMIT}"
    settings = json.loads((made / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("me/base", COMMIT)
