"""Fold an adapter into the weights, and give the base back bit for bit.

A merge swaps each changed tensor for a new one and keeps the old; nothing is subtracted, so
nothing drifts, and unmerging puts the very same storage back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sidepath.core.adapted import speak_up, step_aside
from sidepath.core.blocks import fuse, unfuse
from sidepath.core.delta import LayerDelta, WeightDelta
from sidepath.errors import MergeError, TiedWeights
from sidepath.injection.architecture import modules_of
from sidepath.injection.registry import Installed, Registry, require_registry


def merge(model: nn.Module, name: str) -> None:
    """Fold adapter `name` into the base: `W0 + s B A`, rounded once. Changes `model` in place.

    Afterwards the model runs the base's own code, call for call (4-bit layers: the base's own
    operations). The base's tensors are kept for `unmerge`, so this needs the memory of the
    changed tensors once more; what an earlier `unmerge(keep=True)` kept is written again.
    Raises `UnknownAdapter`; `MergeError` when one is merged already; `TiedWeights` when a tensor
    to be changed is shared with a module the adapter does not mean.
    """
    registry = require_registry(model)
    installed = registry.adapter(name)
    if registry.merged is not None:
        raise MergeError(
            f'adapter "{registry.merged}" is merged already',
            hint="sidepath.unmerge(model) first; several adapters are merged by `sidepath merge`",
        )
    _refuse_tied(installed, _owners(model))
    folded: dict[str, Tensor] = {}
    seen: set[nn.Parameter] = set()
    for path, delta in installed.deltas.items():
        into = {"weight": registry.spare[path]} if path in registry.spare else None
        view = registry.sides[path].view
        for local, tensor in delta.folded(view, into).items():
            held = view.module._parameters.get(local)
            if held is None or held not in seen:  # a tied parameter is written once
                folded[f"{path}.{local}"] = tensor
            if held is not None:
                seen.add(held)
    registry.spare = {}
    registry.pristine = _swap(model, folded)
    registry.merged = name
    registry.routing.silent = True
    for side in registry.sides.values():
        step_aside(side)
    for module in registry.fused:
        unfuse(module)


def unmerge(model: nn.Module, *, keep: bool = False) -> None:
    """Take the merged adapter out again: the base's own tensors, bit for bit. In place.

    `keep` holds on to the memory of the merged matrices, so that the next `merge` writes into it
    instead of allocating: then swapping one merged adapter for another takes no new memory. It
    is given up by that merge, by `unmerge()` and with the last adapter; who still holds such a
    matrix from the time of the merge will see it overwritten.

    Raises `MergeError` when nothing is merged.
    """
    registry = require_registry(model)
    if registry.merged is None:
        raise MergeError("no adapter is merged into the base")
    deltas = registry.adapter(registry.merged).deltas
    folded = _swap(model, registry.pristine)
    if keep:  # matrices alone: other tensors may be the adapter's own
        matrices = [path for path, delta in deltas.items() if isinstance(delta, WeightDelta)]
        registry.spare = {path: folded[f"{path}.weight"] for path in matrices}
    registry.pristine = {}
    registry.merged = None
    registry.routing.silent = False
    for module in registry.fused:
        fuse(module, registry.routing)
    for side in registry.sides.values():
        speak_up(side)


@contextmanager
def unfolded(model: nn.Module, registry: Registry) -> Iterator[None]:
    """Within the block a merged base holds its own tensors. Pointers move, nothing is copied."""
    if registry.merged is None:
        yield
        return
    folded = _swap(model, registry.pristine)
    try:
        yield
    finally:
        _swap(model, folded)


@torch.no_grad()
def _swap(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put tensors in the place of the model's own; returns what was there.

    A parameter takes the place of a whole parameter (a packed one holds more than its numbers);
    a plain tensor that of the numbers in it, so that whoever holds the parameter sees them.
    """
    before: dict[str, Tensor] = {}
    modules = {"": model, **dict(modules_of(model))}
    for full, tensor in tensors.items():
        path, _, local = full.rpartition(".")
        module = modules[path]
        held = module._parameters.get(local)
        if isinstance(tensor, nn.Parameter):
            assert held is not None
            before[full] = held
            module._parameters[local] = tensor
        elif held is not None:
            before[full] = held.data
            held.data = tensor
        else:
            before[full] = module.get_buffer(local)
            module._buffers[local] = tensor
    return before


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Every place that holds each parameter, by the parameter's identity."""
    owners: dict[int, list[str]] = {}
    for path, module in (("", model), *modules_of(model)):
        for local, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{path}.{local}" if path else local)
    return owners


def _refuse_tied(installed: Installed, owners: dict[int, list[str]]) -> None:
    # Layers of their own are folded into nothing: their refusal is the one to hear.
    touched = tuple(
        f"{path}." for path, delta in installed.deltas.items() if not isinstance(delta, LayerDelta)
    )
    places = [path for path, delta in installed.deltas.items() if delta.shares]
    faults = [
        " and ".join(names) + " are one tensor"
        for names in owners.values()
        if len(names) > 1
        and any(name.startswith(touched) for name in names)
        # Such deltas give every holder the same numbers.
        and not all(name.rpartition(".")[0] in places for name in names)
    ]
    if faults:
        raise TiedWeights(
            f'merging "{installed.name}" would rewrite a tensor shared with another module',
            faults=faults,
            hint="leave these modules out of the targets; merge on disk (`sidepath merge`), where "
            "tied embeddings are parted; or untie them before injecting (tie_word_embeddings=False "
            "and a copy of the tensor)",
        )
