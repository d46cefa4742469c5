"""Adapters combined: the model with the result gives what the weighted sum of the updates gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sidepath
from sidepath import Combination, combine
from sidepath.combining.elements import put_together
from sidepath.store.manifest import trusted_manifest
from tests.combining.kit import (
    COMMIT,
    IDS,
    added,
    contents,
    doubled,
    logits,
    saved,
    snapshot,
    updates,
    weighted,
)
from tests.conftest import outputs, tiny_gpt2, tiny_llama

DOUBLE = doubled(tiny_llama)


def two(folder: Path, **more: object) -> list[Path]:
    """Adapters of different ranks, scalings and targets, which share some layers."""
    one = saved(
        folder / "sql", 1, DOUBLE, r=3, alpha=5, scaling="alpha/sqrt(r)", dtype="base",
        rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.*.v_proj": 7.0}, **more,
    )  # fmt: skip
    other = saved(
        folder / "legal", 2, DOUBLE, r=4, alpha=8, dtype="base",
        targets=("q_proj", "down_proj", "lm_head"), rank_pattern={"layers.0.*": 1}, **more,
    )  # fmt: skip
    return [one, other]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 0.7), (1.0, -0.5), (0.0, 2.0)])
def test_concatenation_is_the_weighted_sum(tmp_path: Path, weights: tuple[float, ...]) -> None:
    folders = two(tmp_path)
    before = [contents(folder) for folder in folders]
    found = combine(folders, tmp_path / "both", Combination(weights=weights))
    assert [contents(folder) for folder in folders] == before
    total = weighted(folders, weights, DOUBLE)
    sums = updates(tmp_path / "both", DOUBLE)
    for path, update in sums.items():
        torch.testing.assert_close(update, total.pop(path), atol=1e-12, rtol=1e-12)
    assert all(not update.any() for update in total.values()), "left out at weight 0 only"
    expected = outputs(added(DOUBLE, weighted(folders, weights, DOUBLE)), IDS)
    torch.testing.assert_close(logits(DOUBLE, tmp_path / "both"), expected, atol=1e-10, rtol=1e-10)
    assert (found.error, found.relative_error) == (0.0, 0.0)
    for layer in found.layers:
        assert layer["norm"] == pytest.approx(float(sums[layer["name"]].norm()))


def test_the_ranks_add_up_and_the_last_pattern_wins(tmp_path: Path) -> None:
    folders = two(tmp_path)
    recipe = Combination(
        weights=(1, 1), layer_weights={"q_proj": (2.0, -1.0), "layers.0.*.q_proj": (0.0, 0.5)}
    )
    found = combine(folders, tmp_path / "both", recipe)
    ranks = {layer["name"]: layer["r"] for layer in found.layers}
    assert ranks["model.layers.0.self_attn.q_proj"] == 1, "one of weight 0 adds no rank"
    assert ranks["model.layers.1.self_attn.q_proj"] == 2 + 4
    assert ranks["model.layers.1.mlp.down_proj"] == 3 + 4
    assert ranks["model.layers.1.self_attn.k_proj"] == 3
    sums = updates(tmp_path / "both", DOUBLE)
    one, other = (updates(folder, DOUBLE) for folder in folders)
    for path, weights in {
        "model.layers.0.self_attn.q_proj": (0.0, 0.5),
        "model.layers.1.self_attn.q_proj": (2.0, -1.0),
        "model.layers.0.mlp.down_proj": (1.0, 1.0),
    }.items():
        expected = weights[0] * one[path] + weights[1] * other[path]
        torch.testing.assert_close(sums[path], expected, atol=1e-12, rtol=1e-12)


def test_on_the_embedded_base_in_float32(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    def make() -> Any:
        base = sidepath.embedded_base()
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    folders = [
        saved(tmp_path / "one", 1, make, r=4, alpha=8, targets=("q_proj", "v_proj")),
        saved(tmp_path / "two", 2, make, r=8, alpha=8, scaling="alpha/sqrt(r)"),
    ]
    combine(folders, tmp_path / "both", Combination(weights=(0.7, -0.2)))
    base = outputs(make(), IDS)
    expected = outputs(added(make, weighted(folders, (0.7, -0.2), make)), IDS)
    moved = float((expected - base).abs().max())
    assert float((logits(make, tmp_path / "both") - expected).abs().max()) < 1e-5 * moved


@pytest.mark.parametrize("recipe", [{"r": 3}, {"energy": 0.9}, {"r": 2, "energy": 0.9}])
def test_svd_is_the_nearest_and_tells_how_near(tmp_path: Path, recipe: dict[str, float]) -> None:
    folders = two(tmp_path)
    cut = Combination(kind="svd", weights=(1.0, -0.5), **recipe)  # type: ignore[arg-type]
    found = combine(folders, tmp_path / "both", cut)
    total = weighted(folders, (1.0, -0.5), DOUBLE)
    sums = updates(tmp_path / "both", DOUBLE)
    assert set(sums) == set(total)
    for layer in found.layers:
        wanted, r = total[layer["name"]], layer["r"]
        sigma = torch.linalg.svdvals(wanted)
        error = float((wanted - sums[layer["name"]]).norm())
        assert error == pytest.approx(layer["error"], abs=1e-10)
        assert error == pytest.approx(float(sigma[r:].norm()), abs=1e-10)
        assert r <= recipe.get("r", 99)
        if "energy" in recipe and r < recipe.get("r", 99):
            assert float(sigma[:r].norm() ** 2) >= 0.9 * float(wanted.norm() ** 2)
    whole = float(torch.cat([update.flatten() for update in total.values()]).norm())
    assert found.relative_error == pytest.approx(found.error / whole)


def test_a_rank_that_is_there_already_is_exact(tmp_path: Path) -> None:
    folders = two(tmp_path)
    found = combine(folders, tmp_path / "cut", Combination(kind="svd", r=7))
    combine(folders, tmp_path / "sum", Combination())
    assert found.error == 0.0
    names = ["cut", "sum"]
    cut, whole = (load_file(tmp_path / name / "adapter_model.safetensors") for name in names)
    assert all(torch.equal(cut[key], whole[key]) for key in whole)


@pytest.mark.parametrize("kind", ["ties", "dare", "dare-ties"])
def test_elementwise_kinds_look_at_whole_updates(tmp_path: Path, kind: str) -> None:
    folders = two(tmp_path)
    weights, density = (1.0, -0.5), 0.4
    recipe = Combination(kind=kind, weights=weights, r=5, density=density, seed=3)  # type: ignore[arg-type]
    found = combine(folders, tmp_path / "both", recipe)
    parts = [updates(folder, DOUBLE) for folder in folders]
    sums = updates(tmp_path / "both", DOUBLE)
    for layer in found.layers:
        name = layer["name"]
        held = [w * part[name] for w, part in zip(weights, parts, strict=True) if name in part]
        wanted = put_together(held, kind, density, (3, name))
        assert layer["norm"] == pytest.approx(float(wanted.norm()))
        assert layer["error"] == pytest.approx(float((wanted - sums[name]).norm()), abs=1e-10)
        best = float(torch.linalg.svdvals(wanted)[layer["r"] :].norm())
        assert layer["error"] == pytest.approx(best, abs=1e-10)
        assert layer["r"] <= 5
    again = combine(folders, tmp_path / "again", recipe)
    assert again.layers == found.layers


def test_common_scalings_stay_and_16_bit_factors_are_not_rounded_again(tmp_path: Path) -> None:
    folders = [
        saved(tmp_path / name, seed, r=r, alpha=3.0 * r, dtype="bfloat16", targets=("q_proj",))
        for seed, (name, r) in enumerate({"one": 2, "two": 4}.items())
    ]
    first, second = (load_file(one / "adapter_model.safetensors") for one in folders)

    def read(name: str) -> dict[str, torch.Tensor]:
        return dict(load_file(tmp_path / name / "adapter_model.safetensors"))

    combine(folders, tmp_path / "same", Combination(weights=(1, -1)))
    for key, tensor in read("same").items():
        assert tensor.dtype == torch.bfloat16
        both = [first[key], second[key] if "lora_A" in key else -second[key]]
        assert torch.equal(tensor, torch.cat(both, dim=0 if "lora_A" in key else 1))
    combine(folders, tmp_path / "odd", Combination(weights=(1, 0.3)))
    assert {tensor.dtype for tensor in read("odd").values()} == {torch.float32}
    for name, weights in (("same", (1, -1)), ("odd", (1, 0.3))):
        for path, update in updates(tmp_path / name).items():
            expected = weighted(folders, weights)[path]
            torch.testing.assert_close(update, expected, atol=1e-7, rtol=1e-6)


def test_parts_of_a_fused_projection(tmp_path: Path) -> None:
    make = doubled(tiny_gpt2)
    folders = [
        saved(tmp_path / "qv", 1, make, r=2, alpha=6, targets=("c_attn:q,v",), dtype="base"),
        saved(tmp_path / "all", 2, make, r=3, alpha=3, targets=("c_attn", "c_fc"), dtype="base"),
    ]
    combine(folders, tmp_path / "both", Combination(weights=(1.0, 0.5)))
    expected = outputs(added(make, weighted(folders, (1.0, 0.5), make)), IDS)
    torch.testing.assert_close(logits(make, tmp_path / "both"), expected, atol=1e-10, rtol=1e-10)


def test_the_folder_is_one_of_ours(tmp_path: Path) -> None:
    folders = two(tmp_path)
    recipe = Combination(kind="svd", r=2, weights=(1.0, -0.5))
    found = combine(folders, tmp_path / "both", recipe, record={"command": "typed"})
    adapter = sidepath.load(DOUBLE(), tmp_path / "both")
    parents = adapter.record["combined"]["adapters"]
    assert parents == found.adapters
    manifests = [json.loads((folder / "sidepath.json").read_text()) for folder in folders]
    assert [parent["digest"] for parent in parents] == [
        manifest["files"]["adapter_model.safetensors"]["sha256"] for manifest in manifests
    ]
    assert [(one["name"], one["weight"]) for one in parents] == [("sql", 1.0), ("legal", -0.5)]
    assert adapter.record["combined"]["r"] == 2
    assert adapter.record["command"] == "typed"
    assert "versions" in adapter.record
    again = combine([tmp_path / "both", folders[0]], tmp_path / "more")
    assert [one["name"] for one in again.adapters] == ["both", "sql"]
    other = DOUBLE()
    with torch.no_grad():
        other.get_parameter("model.layers.0.mlp.up_proj.weight").add_(1)
    with pytest.raises(sidepath.errors.WrongBase):
        sidepath.load(other, tmp_path / "both")


def test_plain_folders_of_peft(tmp_path: Path) -> None:
    """Without a manifest nothing names the base: the result is PEFT's too, unless it is given."""
    make = tiny_llama
    make().save_pretrained(tmp_path / "base")
    folders = [
        saved(tmp_path / "one", 1, make, r=2, scaling="alpha/sqrt(r)"),
        saved(tmp_path / "two", 2, make, r=3, targets=("q_proj", "lm_head")),
    ]
    ours = combine(folders, tmp_path / "ours", Combination(weights=(1, -1)))
    for folder in folders:
        for name in ("sidepath.json", "README.md", "settings.toml"):
            (folder / name).unlink()
    recipe = Combination(weights=(1, -1))
    theirs = combine(folders, tmp_path / "theirs", recipe)
    ranks = {one["name"]: one["r"] for one in ours.layers}
    assert {one["name"]: one["r"] for one in theirs.layers} == ranks
    assert len(theirs.notes) == 2
    assert {path.name for path in (tmp_path / "theirs").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    combine(folders, tmp_path / "based", recipe, base=tmp_path / "base")
    with pytest.warns(UserWarning, match="could not be verified"):
        loaded = logits(make, tmp_path / "theirs")
    torch.testing.assert_close(logits(make, tmp_path / "based"), loaded)
    combine(folders[:1], tmp_path / "alone", base=tmp_path / "base")
    with pytest.warns(UserWarning, match="could not be verified"):
        alone = logits(make, folders[0])
    torch.testing.assert_close(logits(make, tmp_path / "alone"), alone, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logits(make, tmp_path / "ours"), loaded)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_reads_the_result(tmp_path: Path) -> None:
    from peft import PeftModel

    folders = [
        saved(tmp_path / "one", 1, r=2, alpha=3, scaling="alpha/sqrt(r)"),
        saved(tmp_path / "two", 2, r=3, targets=("q_proj", "lm_head"), train_whole=("norm",)),
    ]
    combine(folders, tmp_path / "both", Combination(weights=(1.0, 1.0)))
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path / "both").eval()
    torch.testing.assert_close(
        outputs(theirs, IDS), logits(tiny_llama, tmp_path / "both"), atol=1e-5, rtol=1e-5
    )


def test_a_repeated_embedding_must_be_one(tmp_path: Path) -> None:
    """PEFT saves the base's table beside an adapted embedding."""
    folders = [saved(tmp_path / name, n, targets=("embed_tokens",)) for n, name in enumerate("ab")]
    for number, folder in enumerate(folders):
        for name in ("sidepath.json", "README.md", "settings.toml"):
            (folder / name).unlink()
        path = folder / "adapter_model.safetensors"
        table = tiny_llama().get_parameter("model.embed_tokens.weight").detach() + number
        key = "base_model.model.model.embed_tokens.base_layer.weight"
        save_file({**load_file(path), key: table}, path, metadata={"format": "pt"})
    with pytest.raises(sidepath.errors.StoreError, match="not the same in all adapters"):
        combine(folders, tmp_path / "both")


def test_adapters_of_the_hub_are_named_by_their_repositories(tmp_path: Path) -> None:
    """And their base's commit stays with the result."""

    def based() -> Any:
        model = tiny_llama()
        model.config.name_or_path = str(tmp_path / "models--me--base" / "snapshots" / COMMIT)
        return model

    folders = [saved(snapshot(tmp_path, name), seed, based) for seed, name in enumerate("ab")]
    found = combine(folders, tmp_path / "out")
    assert [one["name"] for one in found.adapters] == ["a", "b"]
    manifest = trusted_manifest(found.output)
    assert (manifest.base_name, manifest.base_revision) == ("me/base", COMMIT)
