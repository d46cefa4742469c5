"""A GGUF file understood as simply as can be, and what can be done to one.

Understood are the kinds of values that an adapter's file has; a list fails, as does a version 1.
"""

from __future__ import annotations

import math
import random
import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.fuzz.mutators import JSON, ODD_NAMES, Mutator

FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT = 8
ALIGNMENT = "general.alignment"
PASSPORT = "sidepath.passport"
ODD_COUNTS = (0, 1, 2, 9, 255, 2**16, 2**31, 2**32 + 1, 2**40, 2**63, 2**64 - 1)


@dataclass
class Parts:
    """What a file holds: its version, keys with kinds, tensors with sizes, kind and offset."""

    version: int = 3
    keys: list[tuple[str, int, Any]] = field(default_factory=list)
    tensors: list[tuple[str, list[int], int, int]] = field(default_factory=list)
    body: bytes = b""

    def get(self, name: str) -> Any:
        """The value of a key; None where there is none."""
        return next((value for key, _, value in self.keys if key == name), None)


class _Front:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 4

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return value

    def text(self) -> str:
        size = self.number("Q")
        self.at += size
        assert self.at <= len(self.data)
        return self.data[self.at - size : self.at].decode()


def taken_apart(data: bytes) -> Parts:
    """The parts of a file."""
    assert data[:4] == b"GGUF"
    front = _Front(data)
    parts = Parts(front.number("I"))
    assert parts.version in (2, 3)
    tensors, keys = front.number("Q"), front.number("Q")
    for _ in range(keys):
        name, kind = front.text(), front.number("I")
        parts.keys.append((name, kind, front.text() if kind == TEXT else front.number(FORMS[kind])))
    for _ in range(tensors):
        name = front.text()
        sizes = [front.number("Q") for _ in range(front.number("I"))]
        parts.tensors.append((name, sizes, front.number("I"), front.number("Q")))
    alignment = parts.get(ALIGNMENT) or 32
    parts.body = data[-(-front.at // alignment) * alignment :]
    return parts


def put_together(parts: Parts, keys: int | None = None, tensors: int | None = None) -> bytes:
    """The file of these parts; the counts are those that are there unless they are given."""
    out = b"GGUF" + struct.pack("<I", parts.version)
    out += struct.pack("<Q", len(parts.tensors) if tensors is None else tensors)
    out += struct.pack("<Q", len(parts.keys) if keys is None else keys)
    for name, kind, value in parts.keys:
        packed = _text(value) if kind == TEXT else struct.pack("<" + FORMS[kind], value)
        out += _text(name) + struct.pack("<I", kind) + packed
    for name, sizes, kind, offset in parts.tensors:
        out += _text(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        out += struct.pack("<IQ", kind, offset)
    alignment = parts.get(ALIGNMENT)
    alignment = alignment if isinstance(alignment, int) and 0 < alignment < 2**20 else 32
    return out + b"\0" * (-len(out) % alignment) + parts.body


def _text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogateescape" if value.isascii() else "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def numbers_in(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """A file's keys, and its tensors in float64, rows by columns."""
    parts = taken_apart(data)
    found = {}
    for name, sizes, kind, offset in parts.tensors:
        count = math.prod(sizes)
        if kind == 30:  # bfloat16: the upper half of a float32
            halves = np.frombuffer(parts.body, "<u2", count, offset)
            values = (halves.astype("<u4") << 16).view("<f4")
        else:
            values = np.frombuffer(parts.body, {0: "<f4", 1: "<f2"}[kind], count, offset)
        found[name] = values.astype(np.float64).reshape(sizes[::-1])
    return {name: value for name, _, value in parts.keys}, found


# Mutators


def counts(rng: random.Random, data: bytes) -> bytes:
    """The number of keys or of tensors, or the length of the first text."""
    at = rng.choice((8, 16, 24))
    return data[:at] + struct.pack("<Q", rng.choice(ODD_COUNTS)) + data[at + 8 :]


def key(rng: random.Random, data: bytes) -> bytes:
    """A key goes, comes twice, is called otherwise, or has another value or kind."""
    parts = taken_apart(data)
    at = rng.randrange(len(parts.keys))
    name, kind, value = parts.keys[at]
    what = rng.randrange(5)
    if what == 0:
        del parts.keys[at]
    elif what == 1:
        parts.keys.append(parts.keys[at])
    elif what == 2:
        parts.keys[at] = (rng.choice((*ODD_NAMES, name + "x")), kind, value)
    elif what == 3:
        parts.keys[at] = (name, *rng.choice(((TEXT, "x"), (4, 7), (6, float("nan")), (6, 1e30))))
    else:
        parts.keys.insert(at, (ALIGNMENT, 4, rng.choice((0, 1, 3, 8, 64, 2**20, 2**31))))
    return put_together(parts)


def a_list(rng: random.Random, data: bytes) -> bytes:
    """A list, perhaps of an absurd length, stands before the keys."""
    kind = rng.choice((0, 4, 6, TEXT, 9, 99))
    count = rng.choice((0, 1, 3, *ODD_COUNTS))
    inside = b"\0" * (8 if count == 1 else 24 if count == 3 else 0)
    entry = _text("list") + struct.pack("<IIQ", 9, kind, count) + inside
    (keys,) = struct.unpack_from("<Q", data, 16)
    return data[:16] + struct.pack("<Q", keys + 1) + entry + data[24:]


def tensor(rng: random.Random, data: bytes) -> bytes:
    """One tensor's entry: its name, sizes, kind, place; or it goes, or comes twice."""
    parts = taken_apart(data)
    at = rng.randrange(len(parts.tensors))
    name, sizes, kind, offset = parts.tensors[at]
    what = rng.randrange(6)
    if what == 0:
        name = rng.choice((*ODD_NAMES, name + "x", rng.choice(parts.tensors)[0]))
    elif what == 1:
        sizes = rng.choice((sizes[::-1], [], [0], [2**40, 2**40], [1] * 9, [*sizes, 1], [2**62]))
    elif what == 2:
        kind = rng.choice((0, 1, 2, 8, 28, 30, 99))
    elif what == 3:
        offset = rng.choice((0, 1, 32, offset + 32, 2**40, 2**64 - 1, rng.choice(parts.tensors)[3]))
    elif what == 4:
        parts.tensors.append(parts.tensors[at])
    if what == 5:
        del parts.tensors[at]
    else:
        parts.tensors[at] = (name, sizes, kind, offset)
    return put_together(parts)


def many(rng: random.Random, data: bytes) -> bytes:
    """Thousands of empty tensors behind the real ones."""
    parts = taken_apart(data)
    more = range(rng.choice((100, 2000)))
    parts.tensors += [(f"t{number}", [0], 0, len(parts.body)) for number in more]
    return put_together(parts)


def passport(rng: random.Random, data: bytes) -> bytes:
    """The passport, changed as JSON is."""
    parts = taken_apart(data)
    (at,) = (n for n, (name, _, _) in enumerate(parts.keys) if name == PASSPORT)
    name, kind, value = parts.keys[at]
    changed = rng.choice(JSON)(rng, value.encode())
    parts.keys[at] = (name, kind, changed.decode("utf-8", "replace"))
    return put_together(parts)


def wild_numbers(rng: random.Random, data: bytes) -> bytes:
    """NaN, infinities and denormal numbers among the tensors'."""
    parts = taken_apart(data)
    at = 4 * rng.randrange(len(parts.body) // 4)
    value = rng.choice((b"\xff" * 4, struct.pack("<f", float("inf")), b"\1\0\0\0"))
    parts.body = parts.body[:at] + value + parts.body[at + 4 :]
    return put_together(parts)


def same(rng: random.Random, data: bytes) -> bytes:
    """Other bytes that say the same: the keys in another order, the tensors too."""
    parts = taken_apart(data)
    rng.shuffle(parts.keys)
    rng.shuffle(parts.tensors)
    return put_together(parts)


GGUF: tuple[Mutator, ...] = (
    counts, key, key, a_list, tensor, tensor, tensor, many, passport, passport, wild_numbers, same,
)  # fmt: skip
