"""What the backward pass keeps of a layer's input: the input, or less that gives it again.

A norm's output is many times used and cheap to make from the norm's input, which the norm keeps
in any case. So the norm leaves a note on its output how to make it again, and a fused layer
that reads it keeps what the note names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

_NOTE = "_sidepath_note"

Again = Callable[[Sequence[Tensor]], Tensor]
"""From the tensors of a note to the tensor it stands on."""


class _Note(NamedTuple):
    tensors: tuple[Tensor, ...]
    again: Again
    version: int


def note(y: Tensor, tensors: tuple[Tensor, ...], again: Again) -> None:
    """Leave a note on `y` that `again(tensors)` is `y`, as long as nobody writes into it."""
    y.__dict__[_NOTE] = _Note(tensors, again, y._version)


def keep(x: Tensor) -> tuple[tuple[Tensor, ...], Again]:
    """The tensors to save in the place of `x`, and what makes `x` of them."""
    found = x.__dict__.get(_NOTE)
    if isinstance(found, _Note) and found.version == x._version:
        return found.tensors, found.again
    return (x,), _itself


def _itself(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0]
