"""What was watched while an adapter was trained, and the file that keeps it: `history.json`.

    {"format": 1, "every": 5, "loss": [one a step], "held_out": [[step, loss], ...],
     "steps": [5, 10, ...], "layers": [{"name": path, "effective_rank": [one a watched step],
     "b_norm": [...], "gradient_norm": [...]}, ...]}

`effective_rank` and `b_norm` are null where a place has no thin factors.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import sys
from dataclasses import dataclass
from typing import Any

from sidepath.errors import DamagedAdapter, StoreError
from sidepath.store.tensors import read_json

FILE = "history.json"
FORMAT = 1
MAX_BYTES = 256 * 2**20
"""The largest file that is read."""
Series = tuple[float | None, ...]
"""A number for each watched step; None where it was not finite."""


@dataclass(frozen=True)
class LayerHistory:
    """One place of the adapter over the watched steps."""

    name: str
    """Path of the module."""
    effective_rank: Series | None
    """exp(entropy) of the shares of ΔW's singular values, after the step; with DoRA, of the
    direction's update. Of the form that is saved (PiSSA and OLoRA: of rank 2r). None where the
    update is no product of trained thin factors."""
    b_norm: Series | None
    """Frobenius norm of B in the form that is saved, after the step."""
    gradient_norm: Series
    """L2 norm of the gradient of the place's trained tensors, over all processes, before
    clipping and without the deltas' own penalties."""


@dataclass(frozen=True)
class History:
    """The loss of every step, and each place of the adapter at every so many."""

    every: int
    """Steps between two looks."""
    loss: tuple[float, ...]
    """Mean loss of each step's targets in nats, from step 1 on."""
    held_out: tuple[tuple[int, float], ...]
    """The held-out loss in nats after those steps that were followed by an evaluation."""
    steps: tuple[int, ...]
    """The steps that were watched, from 1."""
    layers: tuple[LayerHistory, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    def as_json(self) -> str:
        """The text of `history.json`."""
        return json.dumps(self.as_dict(), ensure_ascii=False, allow_nan=False) + "\n"


def read_history(path: str | os.PathLike[str]) -> History:
    """Read and check a `history.json`.

    Errors: `StoreError` for a file that cannot be read, or is larger than `MAX_BYTES`;
    `DamagedAdapter` with all faults.
    """
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise StoreError("the history is too large to be read", where=path, expected=MAX_BYTES)
        values = read_json(path)
    except OSError as error:
        raise StoreError(f"cannot read the history: {error.strerror}", where=path) from error
    except ValueError as error:
        raise DamagedAdapter("the history is not JSON", where=path, found=error) from error
    faults = _faults(values)
    if faults:
        raise DamagedAdapter("the history has faults", where=path, faults=faults)
    return _built(values)


def _built(values: dict[str, Any]) -> History:
    return History(
        every=values["every"],
        loss=tuple(values["loss"]),
        held_out=tuple((step, loss) for step, loss in values["held_out"]),
        steps=tuple(values["steps"]),
        layers=tuple(
            LayerHistory(
                layer["name"],
                _series(layer["effective_rank"]),
                _series(layer["b_norm"]),
                tuple(layer["gradient_norm"]),
            )
            for layer in values["layers"]
        ),
    )


def _series(values: list[float | None] | None) -> Series | None:
    return None if values is None else tuple(values)


_KEYS = {"format", *(field.name for field in dataclasses.fields(History))}
_SERIES = ("effective_rank", "b_norm", "gradient_norm")
_LAYER_KEYS = {"name", *_SERIES}


def _faults(values: Any) -> list[str]:
    """Everything that is wrong with the values of a file."""
    if not isinstance(values, dict) or values.keys() != _KEYS:
        return [f"expected an object with {', '.join(sorted(_KEYS))}"]
    if values["format"] != FORMAT:
        return [f"format {values['format']!r}, this version reads {FORMAT}"]
    loss, steps, layers = values["loss"], values["steps"], values["layers"]
    faults = [] if _is_count(values["every"]) else [f"every: {values['every']!r}"]
    if not (isinstance(loss, list) and all(_is_number(one) for one in loss)):
        return [*faults, "loss: expected a finite number for each step"]
    if not _rises(steps, len(loss)):
        return [*faults, f"steps: expected rising numbers from 1 to {len(loss)}"]
    held_out = values["held_out"]
    pairs = isinstance(held_out, list) and all(
        isinstance(one, list) and len(one) == 2 and _is_number(one[1]) for one in held_out
    )
    if not (pairs and _rises([step for step, _ in held_out], len(loss))):
        faults.append("held_out: expected pairs of a step, rising, and a finite loss")
    if not isinstance(layers, list):
        return [*faults, "layers: expected a list"]
    faults += [fault for layer in layers for fault in _layer_faults(layer, len(steps))]
    names = [str(layer["name"]) for layer in layers if isinstance(layer, dict) and "name" in layer]
    return faults if len(set(names)) == len(names) else [*faults, "layers: a name stands twice"]


def _layer_faults(layer: Any, count: int) -> list[str]:
    if not isinstance(layer, dict) or layer.keys() != _LAYER_KEYS:
        return [f"layers: expected objects with {', '.join(sorted(_LAYER_KEYS))}"]
    faults = [] if isinstance(layer["name"], str) else [f"layers: name {layer['name']!r}"]
    for key in _SERIES:
        series = layer[key]
        if series is None and key != "gradient_norm":
            continue
        good = isinstance(series, list) and len(series) == count
        if not (good and all(one is None or (_is_number(one) and one >= 0) for one in series)):
            expected = f"{count} finite numbers, none below 0"
            faults.append(f"{layer['name']}: {key}: expected {expected}")
    return faults


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    """Whether it is a number that a float can hold."""
    if type(value) is int:  # JSON's integers have no end, and `isfinite` asks for a float
        return abs(value) <= sys.float_info.max
    return type(value) is float and math.isfinite(value)


def _rises(steps: Any, last: int) -> bool:
    """Whether these are steps of a run, each after the one before."""
    if not (isinstance(steps, list) and all(_is_count(step) for step in steps)):
        return False
    return all(a < b for a, b in itertools.pairwise([*steps, last + 1]))
