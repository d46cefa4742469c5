"""Saved adapters with other factors: loaded again, they compute what was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import sidepath
from sidepath.analyse import Keep, factors_of, truncate
from sidepath.errors import StoreError
from sidepath.methods.lora import LoRA
from sidepath.store.adapter import inject
from sidepath.store.refactored import write_refactored
from tests.conftest import tiny_gpt2


class Layers(nn.Module):
    """Each kind of layer whose update is a matrix, and one to be trained whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(7, 9)
        self.fused = nn.Linear(7, 12)
        self.embedding = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(4, 6, 3)
        self.grouped = nn.Conv1d(4, 6, 3, groups=2)
        self.head = nn.Linear(5, 2)


TARGETS = ("linear", "fused", "embedding", "conv", "grouped")


def saved(folder: Path, *, manifest: bool) -> Path:
    config = LoRA(
        r=3, alpha=5, targets=TARGETS, train_whole=("head",), scaling="alpha/sqrt(r)", dtype="base"
    )
    adapter = inject(Layers(), config, "made")
    torch.manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data.normal_()
    adapter.save(folder, record={"seed": 7}, files={"settings.toml": "x = 1\n"})
    if not manifest:
        for name in ("sidepath.json", "README.md", "settings.toml"):
            (folder / name).unlink()
    return folder


def updates(folder: Path) -> dict[str, torch.Tensor]:
    """Slow reference: each dense update of a folder."""
    return {
        path: factors.scaling * factors.B_Or.double() @ factors.A_RI.double()
        for path, factors in factors_of(folder).items()
    }


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("keep", [Keep(r=2), Keep(energy=0.8), Keep()])
def test_the_new_folder_holds_the_new_updates(tmp_path: Path, manifest: bool, keep: Keep) -> None:
    source = saved(tmp_path / "source", manifest=manifest)
    cut = {path: truncate(factors, keep) for path, factors in factors_of(source).items()}
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    pairs = {path: (one.A_KI, one.B_OK) for path, one in cut.items()}
    target = write_refactored(source, tmp_path / "target", pairs, {"truncated": True})
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    found, old = updates(target), updates(source)
    for path, one in cut.items():
        wanted = one.B_OK @ one.A_KI
        torch.testing.assert_close(found[path], wanted, atol=1e-5, rtol=1e-5)
        assert float((found[path] - old[path]).norm()) == pytest.approx(one.error, abs=1e-4)
    loaded = sidepath.load(Layers(), target, "again", allow_other_base=not manifest)
    for path, one in cut.items():
        assert loaded.installed.config.rank_of(path) == one.r  # type: ignore[attr-defined]
        assert loaded.installed.config.scaling_of(path) == 1  # type: ignore[attr-defined]
    assert (target / "settings.toml").exists() is manifest
    if manifest:
        assert loaded.record["seed"] == 7
        assert loaded.record["truncated"] is True


def test_whole_modules_stay_and_dropped_updates_go(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", manifest=True)
    one = truncate(factors_of(source)["linear"], Keep(r=1))
    target = write_refactored(source, tmp_path / "kept", {"linear": (one.A_KI, one.B_OK)}, {})
    loaded, old = (sidepath.load(Layers(), folder, "it") for folder in (target, source))
    assert set(loaded.deltas) == {"linear", "head"}
    for name, tensor in old.deltas["head"].tensors().items():
        assert torch.equal(loaded.deltas["head"].tensors()[name], tensor)
    settings = json.loads((target / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (1, 1)
    assert settings["target_modules"] == ["linear"]
    again = inject(Layers(), loaded.installed.config, "fresh")
    assert set(again.deltas) == {"linear", "head"}, "its settings say the same"


def test_parts_become_one_update_of_the_matrix(tmp_path: Path) -> None:
    model = tiny_gpt2()
    config = LoRA(r=2, alpha=6, targets=("c_attn:q,v",), dtype="float32")
    adapter = inject(model, config, "made")
    torch.manual_seed(3)
    for parameter in adapter.parameters():
        parameter.data.normal_(std=0.3)
    ids = torch.tensor([[5, 6, 7, 8]])
    wanted = model(ids).logits
    source = adapter.save(tmp_path / "source")
    sidepath.remove(model, "made")
    whole = {path: truncate(one, Keep()) for path, one in factors_of(source).items()}
    pairs = {path: (one.A_KI, one.B_OK) for path, one in whole.items()}
    target = write_refactored(source, tmp_path / "target", pairs, {})
    loaded = sidepath.load(model, target, "again")
    assert {delta.r for delta in loaded.deltas.values()} == {4}, "two parts of rank 2"
    torch.testing.assert_close(model(ids).logits, wanted, atol=1e-4, rtol=1e-4)


def test_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", manifest=True)
    pair = (torch.zeros(1, 7), torch.zeros(9, 1))
    with pytest.raises(StoreError, match="one of the folders that are read"):
        write_refactored(source, source, {"linear": pair}, {})
    with pytest.raises(StoreError, match="without any update left"):
        write_refactored(source, tmp_path / "new", {}, {})
    with pytest.raises(StoreError, match="no update there"):
        write_refactored(source, tmp_path / "new", {"elsewhere": pair}, {})
    assert not (tmp_path / "new").exists()
