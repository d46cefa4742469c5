"""Safetensors files written tensor by tensor, shard by shard (floor 5).

What lies in another file already is copied by the kernel (`os.sendfile`), neighbours in one go; all
else is made, written and forgotten, one tensor at a time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidepath.merging.mapped import Place
from sidepath.store.tensors import DTYPE_NAMES

DTYPES: Mapping[torch.dtype, str] = {
    **DTYPE_NAMES,
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Safetensors' names of dtypes."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    """Gives the tensor, in this dtype and shape."""
    place: Place | None = None
    """Where a file holds its bytes already."""

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(path: Path, entries: Iterable[Entry]) -> None:
    """Write one safetensors file; wide dtypes first, so that every tensor is aligned.

    Within a dtype the tensors keep the order they come in. Errors: `OSError`.
    """
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    with open(path, "wb", buffering=0) as file, ExitStack() as opened:
        _write(file, _head(ordered))
        sources: dict[Path, int] = {}
        for run in _runs(ordered):
            place = run[0].place
            if place is None:
                _write(file, _bytes(run[0].make()))
                continue
            if place.path not in sources:
                sources[place.path] = os.open(place.path, os.O_RDONLY)
                opened.callback(os.close, sources[place.path])
            _copy(file, sources[place.path], place.start, sum(entry.size for entry in run))


def write_index(path: Path, metadata: Mapping[str, Any], files: Mapping[str, list[Entry]]) -> None:
    """The index of a sharded checkpoint: which file holds which tensor, and their bytes in all.

    `metadata` is the earlier index's; its sizes are made true.
    """
    entries = [entry for own in files.values() for entry in own]
    totals = {"total_size": sum(entry.size for entry in entries)}
    if "total_parameters" in metadata:
        totals["total_parameters"] = sum(math.prod(entry.shape) for entry in entries)
    where = {entry.name: name for name, own in files.items() for entry in own}
    document = {"metadata": {**metadata, **totals}, "weight_map": dict(sorted(where.items()))}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _head(entries: Sequence[Entry]) -> bytes:
    """The header: its length in 8 bytes, and JSON, padded so that the first tensor is aligned."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        stop = at + entry.size
        header[entry.name] = {
            "dtype": DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, stop],
        }
        at = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _runs(entries: Iterable[Entry]) -> list[list[Entry]]:
    """The entries in order; those that lie one behind the other in another file together."""
    runs: list[list[Entry]] = []
    for entry in entries:
        last = runs[-1][-1] if runs else None
        joins = (
            last is not None
            and last.place is not None
            and entry.place is not None
            and entry.place.follows(last.place, last.size)
        )
        if joins:
            runs[-1].append(entry)
        else:
            runs.append([entry])
    return runs


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def _write(file: FileIO, data: bytes | memoryview) -> None:
    view, at = memoryview(data), 0
    while at < len(view):
        at += file.write(view[at:]) or 0


def _copy(file: FileIO, source: int, start: int, size: int) -> None:
    """Let the kernel copy `size` bytes of another file, from `start` on."""
    stop = start + size
    while start < stop:
        sent = os.sendfile(file.fileno(), source, start, stop - start)
        if sent == 0:
            raise OSError("the base's file became shorter while it was read")
        start += sent
