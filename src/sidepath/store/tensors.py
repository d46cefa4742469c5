"""safetensors files from outside, checked before memory is allocated for them (floor 4).

The layout: 8 bytes n (little-endian), n bytes of JSON {name: {dtype, shape, data_offsets}},
then the tensors' bytes, row-major, without gaps. Nothing else is ever loaded: no pickle.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sidepath.errors import DamagedAdapter, StoreError

FLOATING: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in FLOATING.items()}
_FIELDS = {"dtype", "shape", "data_offsets"}
JSON_BYTES, JSON_TABLES, JSON_VALUES = 64 * 2**20, 750_000, 3_000_000
"""The most bytes, lists and tables, and values of a JSON file that is parsed."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Limits:
    """The largest safetensors file that is read at all."""

    header_bytes: int = 8 * 2**20
    tensors: int = 100_000
    rank: int = 8
    elements: int = 2**40


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor's bytes lie: `start` and `stop` count from the file's first byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def there(path: Path) -> bool:
    """Whether anything is at a path, a link that leads nowhere too."""
    return path.exists() or path.is_symlink()


def file_inside(folder: str | os.PathLike[str], name: str) -> Path:
    """The regular file `name` of `folder`; links may not leave the folder.

    The one exception is a snapshot of the hub's cache, whose files are links to its `blobs`.

    Errors: `DamagedAdapter` when the file is missing, not a regular file, or lies elsewhere.
    """
    path = Path(folder, name)
    if name not in ("", ".", "..") and os.path.basename(name) == name:
        with suppress(OSError):
            if stat.S_ISREG(os.lstat(path).st_mode):  # no link, no way out
                return path
    home = Path(os.path.realpath(folder))
    real = Path(os.path.realpath(home / name))
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if not real.is_relative_to(home) and real.parent != blobs:
        raise DamagedAdapter("a file name leads out of its folder", where=folder, found=name)
    if not real.is_file():
        raise DamagedAdapter("a file is missing", where=folder, expected=name)
    return path


def refuse_pickle(path: str | os.PathLike[str]) -> None:
    """Raise `StoreError` for a file that only a pickle loader reads: it could run any code."""
    if str(path).lower().endswith(PICKLES):
        raise StoreError(
            "pickle files are never loaded: reading one can run any code",
            where=path,
            expected="a .safetensors file",
            hint="convert it where you trust its origin: "
            "safetensors.torch.save_file(torch.load(file, weights_only=True), 'out.safetensors')",
        )


def read_header(
    path: str | os.PathLike[str], *, limits: Limits | None = None, floating_only: bool = True
) -> dict[str, TensorInfo]:
    """Read and check a safetensors header; the tensors' bytes stay on disk.

    Checked: header length and JSON, duplicate keys, number of tensors, dtypes (with
    `floating_only`, integers are refused), ranks, sizes, and that the offsets cover the file
    exactly. Errors: one `DamagedAdapter` with all faults; `StoreError` for a pickle.
    """
    return read_head(path, limits=limits, floating_only=floating_only)[0]


def read_head(
    path: str | os.PathLike[str], *, limits: Limits | None = None, floating_only: bool = True
) -> tuple[dict[str, TensorInfo], bytes]:
    """`read_header`, and the bytes that were read for it."""
    refuse_pickle(path)
    limits = limits or Limits()
    try:
        with open(path, "rb", opener=_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DamagedAdapter("not a regular file", where=path)
            size = status.st_size
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if size < 8 or length > size - 8:
                raise damaged(path, [f"truncated: header of {length} bytes, file of {size}"])
            if length > limits.header_bytes:
                raise damaged(path, [f"header of {length} bytes, at most {limits.header_bytes}"])
            text = file.read(length)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}", where=path) from error
    header, faults = _parse(text, limits, 8 + length, floating_only)
    faults = faults or _coverage(header, 8 + length, size)
    if faults:
        raise damaged(path, faults)
    return header, first + text


def _at_once(path: str, flags: int) -> int:
    """Open a file without waiting: a fifo would wait for somebody who writes."""
    return os.open(path, flags | os.O_NONBLOCK)


def small_file(path: str | os.PathLike[str]) -> bytes:
    """A file of settings, whole.

    Errors: `ValueError` beyond `JSON_BYTES`, or when it is no regular file (a fifo would never
    end, or never begin); any `OSError`.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > JSON_BYTES:
        raise ValueError(f"{status.st_size} bytes, at most {JSON_BYTES}")
    with open(path, "rb") as file:
        return file.read(JSON_BYTES + 1)


def read_json(path: str | os.PathLike[str]) -> Any:
    """`strict_json` of a file. Errors: `ValueError` for malformed input, any `OSError`."""
    return strict_json(small_file(path))


def strict_json(text: bytes) -> Any:
    """Parse JSON without duplicate keys; any malformed input is a `ValueError`.

    So is one of more values than any file that is read here has: parsed, they would take many
    times the memory of the text.
    """
    many = max(text.count(b"[") + text.count(b"{") - JSON_TABLES, text.count(b",") - JSON_VALUES)
    if len(text) > JSON_BYTES or many > 0:
        raise ValueError("more values than any such file has")
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        double = sorted({key for key in keys if keys.count(key) > 1}) if len(keys) < 1000 else []
        raise ValueError(f"duplicate keys {', '.join(double)}")
    return values


def _parse(
    text: bytes, limits: Limits, start: int, floating_only: bool
) -> tuple[dict[str, TensorInfo], list[str]]:
    try:
        entries = strict_json(text)
    except ValueError as error:
        return {}, [f"header is not JSON: {error}"]
    if not isinstance(entries, dict):
        return {}, ["header is not a JSON object"]
    metadata = entries.pop("__metadata__", None)  # mlx writes null where it has none
    faults = [] if isinstance(metadata, dict | None) else ["__metadata__ is not an object"]
    if len(entries) > limits.tensors:
        return {}, [*faults, f"{len(entries)} tensors, at most {limits.tensors}"]
    header = {}
    for name, entry in entries.items():
        info, fault = _entry(entry, limits, start, floating_only)
        if info is None:
            faults.append(f"{name}: {fault}")
        else:
            header[name] = info
    return header, faults


def _entry(
    entry: Any, limits: Limits, start: int, floating_only: bool
) -> tuple[TensorInfo | None, str]:
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        return None, "expected dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or (floating_only and dtype not in FLOATING):
        return None, f"dtype {dtype}, expected one of {', '.join(FLOATING)}"
    if not _counts(shape) or len(shape) > limits.rank:
        return None, f"shape {shape}, expected at most {limits.rank} sizes"
    elements = math.prod(shape)
    if elements > limits.elements:
        return None, f"shape {shape}, at most {limits.elements} elements"
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return None, f"data_offsets {offsets}"
    if dtype in FLOATING and offsets[1] - offsets[0] != elements * FLOATING[dtype].itemsize:
        return None, f"{offsets[1] - offsets[0]} bytes for shape {shape} of {dtype}"
    return TensorInfo(dtype, tuple(shape), start + offsets[0], start + offsets[1]), ""


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _coverage(header: Mapping[str, TensorInfo], start: int, size: int) -> list[str]:
    at = start
    for name, info in sorted(header.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != at:
            return [f"{name}: begins at byte {info.start}, expected {at}: a gap or an overlap"]
        at = info.stop
    if at > size:
        return [f"truncated: the tensors end at byte {at}, the file at {size}"]
    return [] if at == size else [f"{size - at} bytes after the last tensor"]


def damaged(path: str | os.PathLike[str], faults: list[str]) -> DamagedAdapter:
    """The error for a safetensors file with these faults."""
    return DamagedAdapter(
        "a safetensors file cannot be trusted",
        where=path,
        faults=faults,
        hint="fetch or save it again",
    )
