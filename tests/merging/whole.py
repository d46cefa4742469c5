"""The slow, obvious merge: all of the base in float32, merged, rounded, saved by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sidepath.injection.merging import merge, unmerge
from sidepath.injection.registry import require_registry
from sidepath.injection.surgery import remove
from sidepath.store.adapter import load
from sidepath.store.sums import add_up


def merged_whole(
    cls: Any, base: Path, folders: Sequence[Path], dtype: torch.dtype | None = None, **options: Any
) -> Any:
    """The merged model, plain, in the base's dtypes or in `dtype`."""
    model = cls.from_pretrained(base, dtype="auto", **options).eval()
    stored = {name: dtype or tensor.dtype for name, tensor in model.named_parameters()}
    names = [f"a{number}" for number in range(len(folders))]
    for name, folder in zip(names, folders, strict=True):
        load(model, folder, name)
    active = names[0] if len(names) == 1 else add_up(model, names)
    model.float()
    merge(model, active)
    registry = require_registry(model)
    kept = {full: model.get_parameter(full).detach().clone() for full in registry.pristine}
    unmerge(model)
    for name in reversed(list(registry.adapters)):
        remove(model, name)
    for full, tensor in kept.items():
        model.get_parameter(full).data = tensor
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(stored[name])
    return model


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Fail unless names, dtypes and every bit agree."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(
            found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        ), name
