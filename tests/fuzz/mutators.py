"""What can be done to the bytes of any file, of JSON, of lines of text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

ODD_NAMES = (
    "", ".", "..", "../outside", "../../etc/passwd", "/etc/passwd", "a/../../b", "x\0y", "\ud800",
    "n" * 5000, "CON", "%2e%2e/", "a\nb", "__metadata__", "toString",
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 2**64 + 1, -(2**63), 10**4000, 0.5, 1e308,
    -0.0, float("nan"), float("inf"), "", "x", "8", [], {}, [0], [-1], [2**40, 2**40], [1] * 50,
    [[]], {"a": 1}, *ODD_NAMES[3:8],
)  # fmt: skip


Mutator = Callable[[random.Random, bytes], bytes]


# Bytes of any file


def flip(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8, 64))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_early(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(min(len(changed), 64))] = rng.randrange(256)
    return bytes(changed)


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def append(rng: random.Random, data: bytes) -> bytes:
    return data + rng.choice((b"\0", b" ", b"\n", b"}", b"x" * 9, data))


def blank(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.choice((1, 4, 8, 100)))
    return data[:start] + rng.choice((b"\0", b"\xff", b" ")) * (stop - start) + data[stop:]


def drop(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.choice((1, 2, 8, 100)) :]


def insert(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.randbytes(rng.choice((1, 2, 8))) + data[start:]


def repeat(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    piece = data[start : start + rng.choice((1, 8, 64))]
    return data[:start] + piece * rng.choice((2, 3, 50)) + data[start:]


def empty(rng: random.Random, data: bytes) -> bytes:
    return b""


BYTES: tuple[Mutator, ...] = (
    flip, flip, flip, flip_early, truncate, append, blank, drop, insert, repeat, empty,
)  # fmt: skip


# JSON


def json_value(rng: random.Random, data: bytes) -> bytes:
    """One value, anywhere, becomes another."""
    values = json.loads(data)
    holder, key = _anywhere(rng, values)
    if holder is None:
        return written(rng.choice(ODD_VALUES))
    old = holder[key]
    nudged = [old + 1, old - 1, -old, old * 2] if type(old) in (int, float) else []
    nudged += [old + "x", old[:-1], old.upper()] if isinstance(old, str) else []
    nudged += [[*old, *old[:1]], old[1:], old[::-1]] if isinstance(old, list) else []
    holder[key] = rng.choice([*ODD_VALUES, *nudged * 3])
    return written(values)


def json_key(rng: random.Random, data: bytes) -> bytes:
    """A key goes, comes, or is called otherwise."""
    values = json.loads(data)
    holder, key = _anywhere(rng, values, dict)
    if holder is None:
        return data + b" "
    what = rng.randrange(3)
    if what == 0:
        del holder[key]
    elif what == 1:
        holder[rng.choice((*ODD_NAMES, key + "x"))] = holder.pop(key)
    else:
        holder[rng.choice((*ODD_NAMES, "extra"))] = rng.choice(ODD_VALUES)
    return written(values)


def json_twice(rng: random.Random, data: bytes) -> bytes:
    """A key stands twice in one object."""
    values = json.loads(data)
    if not isinstance(values, dict) or not values:
        return data + b" "
    key = rng.choice(list(values))
    return b"{" + written(key) + b": " + written(rng.choice(ODD_VALUES)) + b", " + data.lstrip()[1:]


def json_deep(rng: random.Random, data: bytes) -> bytes:
    """Nested deeper than any parser's stack."""
    depth = rng.choice((100, 2000, 100_000))
    start, end = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    inside = start * depth + (b"0" + end * depth if rng.random() < 0.5 else b"")
    return rng.choice((inside, b'{"format": ' + inside + b"}"))


def json_wide(rng: random.Random, data: bytes) -> bytes:
    """Very many tiny values."""
    one = rng.choice((b"[],", b"0,", b"{},", b'"",'))
    return b'{"config": [' + one * rng.choice((1000, 1000, 1000, 100_000)) + b"0]}"


def json_same(rng: random.Random, data: bytes) -> bytes:
    """Other bytes that say the same."""
    values = json.loads(data)
    return rng.choice((written(values), json.dumps(values, indent=3).encode(), data + b"\n"))


JSON: tuple[Mutator, ...] = (
    json_value, json_value, json_value, json_key, json_key, json_twice, json_deep, json_wide,
    json_same,
)  # fmt: skip


def _anywhere(rng: random.Random, values: Any, kind: type | tuple[type, ...] = (dict, list)) -> Any:
    """A container within `values` that is not empty, and a key or an index of it."""
    found: list[Any] = []
    left = [values]
    while left:
        value = left.pop()
        if isinstance(value, (dict, list)):
            found += [value] if value and isinstance(value, kind) else []
            left += value.values() if isinstance(value, dict) else value
    if not found:
        return None, None
    # Long lists of small things would draw all chances.
    holder = rng.choice(found[:3] if rng.random() < 0.4 else found)
    return holder, rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))


def written(value: Any) -> bytes:
    return json.dumps(value).encode()


# Lines of text


def line(rng: random.Random, data: bytes) -> bytes:
    """A line goes, comes twice, changes places, or is cut."""
    lines = data.splitlines(keepends=True)
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    what = rng.randrange(4)
    if what == 0:
        del lines[at]
    elif what == 1:
        lines.insert(other, lines[at])
    elif what == 2:
        lines[at], lines[other] = lines[other], lines[at]
    else:
        lines[at] = lines[at][: rng.randrange(len(lines[at]))] + b"\n"
    return b"".join(lines)


WORDS = (
    *(b'"', b"'", b"{", b"}", b"[", b"]", b",", b"=", b"#", b"\t", b"\r", b"\n", b"\0", b"\xff"),
    *(b"\xef\xbb\xbf", b"null", b"NaN", b"-1", b"1e999", b"9" * 5000, b"../..", b"\\ud800"),
    *(b"[" * 3000, "\u2028".encode(), "\u0085".encode()),
)


def word(rng: random.Random, data: bytes) -> bytes:
    """A text that means something to some parser, put anywhere."""
    at = rng.randrange(len(data) + 1)
    cut = rng.choice((0, 0, 1, 4))
    return data[:at] + rng.choice(WORDS) + data[at + cut :]


LINES: tuple[Mutator, ...] = (line, line, word, word, word)
