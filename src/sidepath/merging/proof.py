"""The proof that a merged folder is the un-merged model: both run, and their outputs compared.

Everything is computed in float32 (`wide.py`), one model after the other (floor 5).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sidepath.injection.registry import base_parameters, require_registry
from sidepath.injection.surgery import activate
from sidepath.merging.folded import Folded, holder, is_half
from sidepath.merging.mapped import Mapped
from sidepath.merging.wide import in_float32
from sidepath.store.parity import Parity, compare, disturbed, outputs_of

Rows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Rounding:
    """What the tensors of a base are rounded to when they are written, by name."""

    stored: Mapping[str, torch.dtype]
    """The dtype each is written in."""
    exact: Mapping[str, torch.dtype]
    """The dtype that holds its values exactly."""


class Loaded(NamedTuple):
    """A model, and the files that its tensors are windows onto."""

    model: nn.Module
    mapped: Mapped


def unmerged_outputs(base: Loaded, name: str, rows: Rows) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs in float32 with the adapter `name` beside the base, and of the base alone for the
    rows it knows, which come first.
    """
    reach = require_registry(base.model).vocabulary.get(0)
    known = [row for row in rows if reach is None or max(row) < reach]
    with in_float32(*base):
        unmerged = outputs_of(base.model, rows)
        activate(base.model, None)
        alone = outputs_of(base.model, known)
        activate(base.model, name)
    return unmerged, alone


def rounding_noise(base: Loaded, name: str, rows: Rows, rounding: Rounding) -> list[Tensor]:
    """How far the outputs of the model, merged in memory and in float32, move when its weights are
    disturbed as rounding them once to what they are stored in would. The model is left as it was.
    """
    exact, noisy = (
        _merged_outputs(base, name, rows, rounding, noise=noise) for noise in (False, True)
    )
    return [one.sub_(other) for one, other in zip(exact, noisy, strict=True)]


def _merged_outputs(
    base: Loaded, name: str, rows: Rows, rounding: Rounding, *, noise: bool
) -> list[Tensor]:
    model = base.model
    exact = {
        full: torch.float32 if is_half(dtype) else dtype for full, dtype in rounding.exact.items()
    }
    folded = Folded(model, name, exact)
    rounded = {
        full
        for full, _ in base_parameters(model)
        if full in folded.touched or rounding.stored[full] != rounding.exact[full]
    }

    def alter(names: Sequence[str]) -> dict[str, Tensor]:
        found = {full: folded.tensor(full) for full in names if full in folded.touched}
        for full in rounded.intersection(names) if noise else ():
            tensor = found.get(full, holder(model, full).detach())
            found[full] = disturbed(full, tensor, rounding.stored[full])
        return found

    with _silent(model), in_float32(*base, alter):
        return outputs_of(model, rows)


@contextmanager
def _silent(model: nn.Module) -> Iterator[None]:
    """Within the block no side path answers."""
    routing = require_registry(model).routing
    before, routing.silent = routing.silent, True
    try:
        yield
    finally:
        routing.silent = before


def parity(base: Loaded, name: str, rows: Rows, rounding: Rounding, merged: Loaded) -> Parity:
    """How far `merged`, read from what was written, is from `base` with its adapter `name`.

    The tolerance is what rounding explains (`store/parity.py`). Both are afterwards as they were.
    """
    unmerged, alone = unmerged_outputs(base, name, rows)
    noise = rounding_noise(base, name, rows, rounding)
    with in_float32(*merged):
        found = outputs_of(merged.model, rows)
    return compare(unmerged, found, alone, noise)
