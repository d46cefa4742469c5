"""Two full checkpoints of one model, side by side: one pair of tensors in memory at a time.

Names are the model's own: each tensor of each module, so that a tied one is named at every module
that uses it (floor 6).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sidepath.combining.dense import frobenius
from sidepath.core.delta import accumulation_dtype
from sidepath.errors import StoreError
from sidepath.store.stored import Checkpoint


@dataclass(frozen=True)
class Change:
    """What became of one tensor."""

    name: str
    shape: tuple[int, ...]
    change: float | None
    """`‖tuned - base‖_F`; None for a tensor that only one checkpoint holds."""
    norm: float
    """Of the base's tensor, or of the one that is there."""
    only_in: str | None = None
    """`base` or `tuned`, where it is missing in the other."""

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {**vars(self), "shape": list(self.shape)}


class Pair:
    """The tensors of two checkpoints by a model's names.

    Errors, when it is made: one `StoreError` that names every tensor whose shapes differ, every one
    of the model that neither checkpoint holds, and those that are stored quantised.
    """

    def __init__(self, model: nn.Module, base: Path, tuned: Path) -> None:
        self.base, self.tuned = Checkpoint(base), Checkpoint(tuned)
        state: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self.state = {name: held for name, held in state.items() if held.is_floating_point()}
        self._names = _tied(self.state)
        faults = [fault for name in self.state for fault in self._faults(name)]
        if faults:
            raise StoreError(
                "the checkpoints are not two of one model",
                where=tuned,
                faults=faults,
                hint="compare a model with the base it was tuned from, both stored unquantised",
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def _stored(self, checkpoint: Checkpoint, name: str) -> str | None:
        """Where a checkpoint holds a tensor: under its name, or under one it is tied to."""
        found = (checkpoint.found(one) for one in self._names[name])
        return next((one for one in found if one is not None), None)

    def _faults(self, name: str) -> Iterator[str]:
        stored = {
            which: (held, one)
            for which, held in (("base", self.base), ("tuned", self.tuned))
            if (one := self._stored(held, name)) is not None
        }
        shape = tuple(self.state[name].shape)
        if not stored:
            yield f"{name}: in neither checkpoint"
        for which, (held, one) in stored.items():
            if held.shape(one) != shape:
                expected = f"expected {list(shape)}"
                yield f"{name}: shape {list(held.shape(one))} in the {which}, {expected}"
            elif not held.floating(one):
                yield f"{name}: the {which} stores no floating numbers, as quantised layers do"

    def in_both(self, name: str) -> bool:
        """Whether both checkpoints hold a tensor."""
        return all(self._stored(one, name) for one in (self.base, self.tuned))

    def in_tuned(self, name: str) -> Tensor | None:
        """The tuned tensor, in its stored type."""
        one = self._stored(self.tuned, name)
        return None if one is None else self.tuned.read(one)

    def difference(self, name: str) -> tuple[Tensor, Tensor] | None:
        """`tuned - base` and the base's tensor, in float32 (float64 where one is stored so).

        None where one of the checkpoints lacks it.
        """
        mine, theirs = (self._stored(one, name) for one in (self.base, self.tuned))
        if mine is None or theirs is None:
            return None
        base, tuned = self.base.read(mine), self.tuned.read(theirs)
        dtype = accumulation_dtype(torch.promote_types(base.dtype, tuned.dtype))
        base = base.to(dtype)
        return tuned.to(dtype) - base, base

    def change(self, name: str) -> Change:
        """How much one tensor differs."""
        found = self.difference(name)
        if found is not None:
            difference, base = found
            return Change(name, tuple(base.shape), frobenius(difference), frobenius(base))
        mine = self._stored(self.base, name)
        holder, one = (self.base, mine) if mine else (self.tuned, self._stored(self.tuned, name))
        assert one is not None
        tensor = holder.read(one)
        return Change(
            name, tuple(tensor.shape), None, frobenius(tensor), "base" if mine else "tuned"
        )

    def unknown(self) -> list[str]:
        """Stored tensors that the model has no place for, and so are not looked at."""
        used = {
            (number, self._stored(one, name))
            for number, one in enumerate((self.base, self.tuned))
            for name in self.state
        }
        return sorted(
            {
                stored
                for number, one in enumerate((self.base, self.tuned))
                for stored in one
                if (number, stored) not in used and stored not in self.state
            }
        )


def _tied(state: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """For each name its own, and then the others of the same tensor."""
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return {name: (name, *names[id(tensor)]) for name, tensor in state.items()}
