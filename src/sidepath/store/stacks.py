"""The memory of many equal blocks, told from that of a few: a step of 96 takes as long as of 9."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from sidepath.core.delta import Delta
from sidepath.core.quant import qualified
from sidepath.injection.architecture import modules_of
from sidepath.methods.base import Site

MANY = 16
"""Blocks from which on it is worth it."""
FEW = (2, 3, 4)
"""Numbers of blocks whose steps are reckoned in full."""
_COUNTERS = frozenset({"layer_idx", "layer_id", "layer_number", "layer_index"})
"""Where blocks hold which of them they are: what alone may tell one from another."""
_SIMPLE = (bool, int, float, str, type(None))
_PLAIN_KINDS = frozenset({"dense", "bias", "whole", "own"})


@dataclass(frozen=True)
class Counted:
    """What one step of a model of so many blocks holds, in bytes."""

    blocks: int
    activations: int
    """Of the peak, beyond weights and one set of gradients."""
    kept: int
    """What is alive between the forward and the backward pass."""
    trained: int
    """The adapter's parameters."""


def equal_blocks(
    model: nn.Module, sites: Sequence[Site], deltas: Mapping[str, Delta]
) -> tuple[str, int] | None:
    """Path and length of the one list of equal blocks, equally adapted; None where there is none.

    Equal are blocks of the same modules with the same settings and parameters. What is adapted
    outside of them has to be something that does not depend on how many they are.
    """
    lists = [
        (path, module)
        for path, module in modules_of(model)
        if isinstance(module, nn.ModuleList)
        and len(module) >= MANY
        and not any(part.isdigit() for part in path.split("."))
    ]
    if len(lists) != 1:
        return None
    path, blocks = lists[0]
    kinds = getattr(getattr(model, "config", None), "layer_types", None)
    if kinds and len(set(kinds)) > 1:
        return None
    inside: dict[str, list[object]] = {str(number): [] for number in range(len(blocks))}
    for site in sites:
        if site.path.startswith(f"{path}."):
            number, _, rest = site.path.removeprefix(f"{path}.").partition(".")
            inside[number].append((rest, site.kind, site.parts, _tensors(deltas[site.path])))
        elif site.kind not in _PLAIN_KINDS:
            return None
    first = (_looks(blocks[0]), inside["0"])
    same = all((_looks(block), inside[str(n)]) == first for n, block in enumerate(blocks))
    return (path, len(blocks)) if same else None


def extended(counts: Sequence[Counted], blocks: int) -> tuple[int, int] | None:
    """Activations and kept bytes of `blocks` blocks, from the counts of `FEW`; None if unsure.

    With `k` bytes kept and `t` trained a block, the peak lies where the backward pass begins,
    which grows by `k - t` a block beyond the gradients, or where it ends, which does not grow.
    A peak that already grows as the steeper of the two does so for ever.
    """
    steps = [
        (b.activations - a.activations, b.kept - a.kept, b.trained - a.trained)
        for a, b in pairwise(counts)
    ]
    if len(set(steps)) != 1:
        return None
    grows, kept, trained = steps[0]
    if grows != max(kept - trained, 0):
        return None
    last, more = counts[-1], blocks - counts[-1].blocks
    return last.activations + more * grows, last.kept + more * kept


def _looks(block: nn.Module) -> list[object]:
    """All that a block's memory can depend on."""
    found: list[object] = []
    for path, module in [("", block), *modules_of(block)]:
        own = {
            name: value
            for name, value in vars(module).items()
            if name not in _COUNTERS and isinstance(value, _SIMPLE)
        }
        found.append((path, qualified(type(module)), own, _tensors(module)))
    return found


def _tensors(module: nn.Module) -> list[object]:
    """Shapes and dtypes of a block's module or of a delta: its own tensors, its layers' too."""
    deep = isinstance(module, Delta)
    own = [*module.named_parameters(recurse=deep), *module.named_buffers(recurse=deep)]
    return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in own]
