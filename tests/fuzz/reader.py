"""One reader of files from outside, as the fuzz sees it; and files read as simply as can be."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidepath.errors import SidepathError
from sidepath.store.tensors import DTYPE_NAMES
from tests.fuzz.headers import split

Files = dict[str, bytes]


class Refused(SidepathError):
    """Said by a reader that tells of damage without raising."""


@dataclass(frozen=True)
class Reader:
    """One reader: `read(folder)` gives what it understood, `says(folder)` what is written there."""

    name: str
    files: Callable[[], Files]
    read: Callable[[Path], Any]
    says: Callable[[Path], Any]
    share: float = 1.0
    """Of the cases, relative to the others."""
    places: bool = True
    """Whether links, fifos and folders stand in for files: not for a file that the user names."""
    sparse: bool = True
    resign: Callable[[Files], Files] | None = None
    """The digests made to fit again, so that what stands behind them is reached."""
    writes: bool = False
    """Whether reading writes into the folder itself (a data base's journal)."""


# What a file says


def tensors_in(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """A safetensors file, understood as simply as can be."""
    head, body = split(path.read_bytes())
    return {
        name: (entry["dtype"], tuple(entry["shape"]), body[slice(*entry["data_offsets"])])
        for name, entry in json.loads(head).items()
        if name != "__metadata__"
    }


def plain(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Tensors in the form of `tensors_in`."""
    return {
        name: (
            DTYPE_NAMES[t.dtype],
            tuple(t.shape),
            t.detach().contiguous().view(torch.uint8).numpy().tobytes(),
        )
        if t.numel()
        else (DTYPE_NAMES[t.dtype], tuple(t.shape), b"")
        for name, t in tensors.items()
    }


def saved(values: Any) -> Any:
    """A value as JSON gives it back, numbers as floats: 16 is 16.0."""
    if isinstance(values, bool) or values is None or isinstance(values, str):
        return values
    if isinstance(values, Mapping):
        return {key: saved(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [saved(value) for value in values]
    return float(values) if isinstance(values, float) or abs(values) < 2**53 else values
