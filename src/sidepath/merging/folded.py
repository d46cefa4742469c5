"""A model's tensors with its active adapter folded in, made one at a time (floor 5)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from sidepath.injection.architecture import modules_of
from sidepath.injection.registry import require_registry
from sidepath.methods.own import held_by


class Folded:
    """What the tensors of a model become by merging an adapter: `W0 + ΔW`, rounded once.

    Sums are in float32 (float64 for float64). The model is left as it is, and one module's merged
    tensors are held at a time: ask for them module by module.

    Errors: `MergeError` for an adapter that no weight can take in.
    """

    def __init__(self, model: nn.Module, name: str, dtypes: Mapping[str, torch.dtype]) -> None:
        """`dtypes`: what each tensor is rounded to, by name."""
        registry = require_registry(model)
        self._model, self._dtypes = model, dtypes
        self._deltas = registry.adapter(name).deltas
        self._views = {path: registry.sides[path].view for path in self._deltas}
        self.touched: dict[str, str] = {
            f"{path}.{local}": path
            for path, delta in self._deltas.items()
            for local in sorted(delta.touches(self._views[path]))
        }
        """The tensors that merging changes, and the module whose delta does, by name."""
        self.longer: dict[str, tuple[int, ...]] = {
            f"{path}.{local}": shape
            for path, delta in self._deltas.items()
            for local, shape in delta.longer(self._views[path]).items()
        }
        """The shapes of those that get another one, by name."""
        self._held: tuple[str, dict[str, Tensor]] = ("", {})

    def tensor(self, full: str) -> Tensor:
        """The merged tensor of that name, in its dtype."""
        path = self.touched.get(full)
        if path is None:
            return holder(self._model, full).detach().to(self._dtypes[full])
        if self._held[0] != path:
            self._held = ("", {})  # its memory is free before the next takes any
            self._held = (path, self._fold(path))
        return self._held[1][full.removeprefix(f"{path}.")].to(self._dtypes[full])

    @torch.no_grad()
    def _fold(self, path: str) -> dict[str, Tensor]:
        view = self._views[path]
        names = (f"{path}.{local}" for local in held_by(view.module))
        converted = any(
            holder(self._model, full).dtype != self._dtypes[full]
            for full in names
            if full in self.touched
        )
        with _exact(view.module) if converted else nullcontext():
            return self._deltas[path].folded(view)


@contextmanager
def _exact(module: nn.Module) -> Iterator[None]:
    """Within the block a module holds its half-precision parameters in float32."""
    held = held_by(module)
    for owner, local, parameter in held.values():
        owner._parameters[local] = nn.Parameter(to_float32(parameter.detach()), False)
    try:
        yield
    finally:
        for owner, local, parameter in held.values():
            owner._parameters[local] = parameter


def is_half(dtype: torch.dtype) -> bool:
    """Whether float32 holds every number of a floating dtype, and more."""
    return dtype.is_floating_point and dtype.itemsize < 4


def to_float32(tensor: Tensor) -> Tensor:
    """A half-precision tensor in float32; any other as it is."""
    return tensor.float() if is_half(tensor.dtype) else tensor


def holder(model: nn.Module, full: str) -> Tensor:
    """A parameter or buffer by its full name."""
    path, _, local = full.rpartition(".")
    module = model.get_submodule(path)
    return module.get_buffer(local) if local in module._buffers else module.get_parameter(local)


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of every tensor of the base, and the first name of the module it is seen in.

    A module that a model holds at two places has two names; adapters know it by the first.
    """
    first = {module: path for path, module in (("", model), *modules_of(model))}
    names = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if module in first:
            for local, tensor in {**module._parameters, **module._buffers}.items():
                if tensor is not None:
                    names[_joined(path, local)] = _joined(first[module], local)
    return names


def _joined(path: str, local: str) -> str:
    return f"{path}.{local}" if path else local
