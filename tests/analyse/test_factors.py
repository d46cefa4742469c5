"""Factors read from a saved folder against the deltas in memory, for every kind of layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sidepath import combine
from sidepath.analyse import factors_of, spectrum
from sidepath.core.views import DenseView, view_of
from sidepath.errors import DamagedAdapter, StoreError
from sidepath.methods.lora import LoRA
from sidepath.methods.lowrank import LowRank
from sidepath.store.adapter import Adapter, inject


class Layers(nn.Module):
    """One layer of each kind whose update is a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 5)
        self.embedding = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(4, 6, 3)
        self.grouped = nn.Conv1d(4, 6, 3, groups=2)


NAMES = ("linear", "embedding", "conv", "grouped")


@pytest.fixture
def adapter() -> Adapter:
    torch.manual_seed(0)
    config = LoRA(r=2, alpha=3, targets=NAMES, rank_pattern={"linear": 3}, scaling="alpha/sqrt(r)")
    made = inject(Layers(), config, "made")
    for parameter in made.parameters():
        parameter.data.normal_()
    return made


def dense_singular_values(adapter: Adapter, name: str) -> list[float]:
    """Slow reference: the whole update, decomposed."""
    delta = adapter.deltas[name]
    view = view_of(adapter.model.get_submodule(name))
    assert isinstance(delta, LowRank)
    assert isinstance(view, DenseView)
    matrix = delta.matrix(view.shape[0], torch.float64)
    values: list[float] = torch.linalg.svdvals(matrix).tolist()
    return [value for value in values if value > 1e-9]


@pytest.mark.parametrize("manifest", [True, False])
def test_every_kind_of_layer(adapter: Adapter, tmp_path: Path, manifest: bool) -> None:
    folder = adapter.save(tmp_path / "made")
    if not manifest:
        (folder / "sidepath.json").unlink()
    found = factors_of(folder)
    assert set(found) == set(NAMES)
    for name, factors in found.items():
        values = [value for value in spectrum(factors).singular_values if value > 1e-9]
        assert values == pytest.approx(dense_singular_values(adapter, name), rel=1e-5), name


@pytest.mark.parametrize("manifest", [True, False])
def test_parts_of_a_fused_projection(tmp_path: Path, manifest: bool) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = GPT2Config(vocab_size=13, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    adapter = inject(GPT2LMHeadModel(settings), LoRA(r=2, targets=("c_attn:q,v",)), "fused")
    for parameter in adapter.parameters():
        parameter.data.normal_()
    folder = adapter.save(tmp_path / "fused")
    if not manifest:
        (folder / "sidepath.json").unlink()
    ((name, factors),) = factors_of(folder).items()
    expected = dense_singular_values(adapter, name)
    assert spectrum(factors).singular_values[: len(expected)] == pytest.approx(expected, rel=1e-5)


def test_a_changed_file_is_refused(adapter: Adapter, tmp_path: Path) -> None:
    folder = adapter.save(tmp_path / "made")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DamagedAdapter):
        factors_of(folder)


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no adapter"):
        factors_of(tmp_path)
    with pytest.raises(StoreError, match="no such adapter"):
        factors_of(tmp_path / "none")


SHAPES = {
    "vectors": ((4,), (4, 4)),
    "numbers": ((), ()),
    "a convolution's A alone": ((4, 2, 3, 3), (4,)),
    "a convolution without a rank": ((4, 2, 3, 3), (4, 0, 1, 1)),
}


def of_peft(folder: Path, shapes: tuple[tuple[int, ...], tuple[int, ...]], r: int) -> Path:
    """A folder of PEFT's with one pair of factors."""
    folder.mkdir()
    ends = (".lora_A.weight", ".lora_B.weight")
    tensors = {
        f"base_model.model.linear{end}": torch.ones(shape)
        for end, shape in zip(ends, shapes, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": r, "lora_alpha": 8, "target_modules": ["linear"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_factors_that_are_no_matrices_are_refused(
    tmp_path: Path, shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    folder = of_peft(tmp_path / "odd", shapes, r=4)
    with pytest.raises(DamagedAdapter, match="linear"):
        factors_of(folder)
    with pytest.raises(DamagedAdapter, match="linear"):
        combine([folder], tmp_path / "out")


def test_a_rank_that_the_settings_do_not_say_is_refused(tmp_path: Path) -> None:
    """The update's scale follows from it."""
    folder = of_peft(tmp_path / "made", ((2, 7), (5, 2)), r=4)
    for read in (factors_of, lambda place: combine([place], tmp_path / "out")):
        with pytest.raises(DamagedAdapter, match=r"linear: rank 2, adapter_config\.json says 4"):
            read(folder)
    assert factors_of(of_peft(tmp_path / "right", ((2, 7), (5, 2)), r=2))["linear"].scaling == 4


def test_a_manifest_that_leads_nowhere_is_a_manifest(tmp_path: Path) -> None:
    """A folder of ours is never read as one of PEFT's, which says less."""
    folder = of_peft(tmp_path / "made", ((2, 7), (5, 2)), r=2)
    (folder / "sidepath.json").symlink_to("nowhere")
    for read in (factors_of, lambda place: combine([place], tmp_path / "out")):
        with pytest.raises(DamagedAdapter):
            read(folder)
