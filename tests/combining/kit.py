"""Adapters and checkpoints for the tests of combining, and the slow way to what they mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sidepath
from sidepath.core.views import view_of
from sidepath.methods.lora import LoRA
from sidepath.store.adapter import inject
from tests.conftest import outputs, tiny_llama

COMMIT = "a1" * 20
IDS = torch.tensor([[5, 6, 7, 9, 11], [3, 4, 8, 8, 2]])


def doubled(make: Callable[[], Any]) -> Callable[[], Any]:
    """The model in float64."""
    return lambda: make().double()


def saved(folder: Path, seed: int, make: Callable[[], Any] = tiny_llama, **settings: Any) -> Path:
    """An adapter whose every tensor has moved, as training would, with the folder's name."""
    adapter = inject(make(), LoRA(**settings), folder.name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.1 * drawn)
    adapter.save(folder, record={"seed": seed}, files={"settings.toml": f"seed = {seed}\n"})
    return folder


def snapshot(cache: Path, name: str) -> Path:
    """Where huggingface_hub keeps `me/NAME` at a commit; not there yet, but for its parents."""
    place = cache / f"models--me--{name}" / "snapshots" / COMMIT
    place.parent.mkdir(parents=True)
    return place


def updates(folder: Path, make: Callable[[], Any] = tiny_llama) -> dict[str, Tensor]:
    """Slow reference: each `ΔW` (O, I) in float64, as the model that loaded the adapter has it."""
    model = make()
    adapter = sidepath.load(model, folder, "read")
    found = {}
    for path, delta in adapter.deltas.items():
        view = view_of(model.get_submodule(path))
        if "A" in delta.tensors() and view is not None:
            found[path] = delta.matrix(view.shape[0], torch.float64).detach()  # type: ignore[operator]
    return found


def weighted(
    folders: Sequence[Path],
    weights: Sequence[float],
    make: Callable[[], Any] = tiny_llama,
) -> dict[str, Tensor]:
    """`Σ w_i ΔW_i` by module path."""
    total: dict[str, Tensor] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for path, update in updates(folder, make).items():
            total[path] = total.get(path, torch.zeros_like(update)) + weight * update
    return total


def added(make: Callable[[], Any], changes: Mapping[str, Tensor]) -> Any:
    """The model with `W + ΔW` in the place of `W`, by plain addition."""
    model = make()
    with torch.no_grad():
        for path, change in changes.items():
            module = model.get_submodule(path)
            view = view_of(module)
            assert view is not None
            matrix = view.matrix().double() + change
            module.weight.copy_(view.from_matrix(matrix.to(module.weight.dtype)))
    return model


def logits(make: Callable[[], Any], folder: Path) -> Tensor:
    """What the model gives with an adapter's folder loaded."""
    model = make()
    sidepath.load(model, folder, "it")
    return outputs(model, IDS)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
