"""GGUF files from outside, checked before memory is allocated for them (floor 5).

The layout (version 3, little-endian): "GGUF", version, number of tensors and of keys; each key with
its type and value; each tensor's name, sizes (innermost first), type and offset; then from the next
multiple of the alignment on the tensors' bytes, each beginning at a multiple of it.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sidepath.errors import DamagedAdapter, StoreError
from sidepath.store.tensors import FLOATING, Limits, TensorInfo

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_TYPES = {0: "F32", 1: "F16", 30: "BF16"}
_ALIGNMENT = "general.alignment"
_KEYS = 10_000


@dataclass
class _Cursor:
    """The bytes of a header, read from the front; `ValueError` where they end."""

    data: bytes
    at: int = 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError(f"the header ends at byte {len(self.data)}: truncated, or too long")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self) -> Any:
        """A key's value; None for a list, which is passed over."""
        kind = self.number("I")
        if kind == _ARRAY:
            item, count = self.number("I"), self.number("Q")
            if item in _SCALARS:
                self.take(count * struct.calcsize("<" + _SCALARS[item]))
            elif item == _STRING:
                self._pass_texts(count)
            else:
                raise ValueError(f"a list of type {item}")
            return None
        if kind == _STRING:
            return self.text()
        if kind not in _SCALARS:
            raise ValueError(f"a value of type {kind}")
        return self.number(_SCALARS[kind])

    def _pass_texts(self, count: int) -> None:
        if count > (len(self.data) - self.at) // 8:
            raise ValueError(f"a list of {count} texts does not fit the header")
        for _ in range(count):
            self.take(self.number("Q"))


def read_gguf_header(
    path: str | os.PathLike[str], limits: Limits | None = None
) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """A GGUF file's keys (lists are left out) and tensors; the tensors' bytes stay on disk.

    Shapes come as rows by columns, as everywhere here. Checked: magic and version, that everything
    lies within the file and within the limits, names that come twice, types (floating ones only),
    and that no tensors overlap. Errors: one `DamagedAdapter` with all faults.
    """
    limits = limits or Limits()
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DamagedAdapter("not a regular file", where=path)
            cursor = _Cursor(file.read(min(status.st_size, limits.header_bytes)))
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}", where=path) from error
    try:
        keys, entries = _parse(cursor, limits)
        header, faults = _placed(keys, entries, cursor.at, status.st_size, limits)
    except (ValueError, struct.error) as error:
        raise _damaged(path, [str(error)]) from error
    if faults:
        raise _damaged(path, faults)
    return keys, header


def _damaged(path: str | os.PathLike[str], faults: list[str]) -> DamagedAdapter:
    return DamagedAdapter(
        "a GGUF file cannot be trusted", where=path, faults=faults, hint="fetch or save it again"
    )


_Entry = tuple[str, tuple[int, ...], int, int]


def _parse(cursor: _Cursor, limits: Limits) -> tuple[dict[str, Any], list[_Entry]]:
    if cursor.take(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}, expected one of {_VERSIONS} in little-endian order")
    tensors, count = cursor.number("Q"), cursor.number("Q")
    if tensors > limits.tensors or count > _KEYS:
        raise ValueError(
            f"{tensors} tensors and {count} keys, at most {limits.tensors} and {_KEYS}"
        )
    keys: dict[str, Any] = {}
    for _ in range(count):
        name = cursor.text()
        if name in keys:
            raise ValueError(f"key {name} comes twice")
        keys[name] = cursor.value()
    entries = []
    for _ in range(tensors):
        name, rank = cursor.text(), cursor.number("I")
        if rank > limits.rank:
            raise ValueError(f"{name}: {rank} dimensions, at most {limits.rank}")
        sizes = tuple(cursor.number("Q") for _ in range(rank))
        entries.append((name, sizes[::-1], cursor.number("I"), cursor.number("Q")))
    return keys, entries


def _placed(
    keys: Mapping[str, Any], entries: list[_Entry], end: int, size: int, limits: Limits
) -> tuple[dict[str, TensorInfo], list[str]]:
    alignment = keys.get(_ALIGNMENT, 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        return {}, [f"{_ALIGNMENT} {alignment!r}, expected a power of two"]
    first = _up(end, alignment)
    header: dict[str, TensorInfo] = {}
    faults = []
    for name, shape, kind, offset in entries:
        if kind not in _TYPES:
            faults.append(f"{name}: type {kind}, expected one of {', '.join(_TYPES.values())}")
        elif name in header:
            faults.append(f"{name}: comes twice")
        elif math.prod(shape) > limits.elements:
            faults.append(f"{name}: shape {list(shape)}, at most {limits.elements} elements")
        else:
            dtype = _TYPES[kind]
            start = first + offset
            stop = start + math.prod(shape) * FLOATING[dtype].itemsize
            header[name] = TensorInfo(dtype, shape, start, stop)
    return header, faults or _coverage(header, first, size, alignment)


def _up(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment


def _coverage(header: Mapping[str, TensorInfo], first: int, size: int, alignment: int) -> list[str]:
    at = first
    for name, info in sorted(header.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != _up(at, alignment):
            return [f"{name}: begins at byte {info.start}, expected {_up(at, alignment)}"]
        at = info.stop
    if header and at > size:
        return [f"truncated: the tensors end at byte {at}, the file at {size}"]
    if header and size > _up(at, alignment):
        return [f"{size - at} bytes after the last tensor"]
    return []
