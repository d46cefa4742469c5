"""What can be done to a safetensors file: its header's length, entries, names; its numbers."""

from __future__ import annotations

import json
import random
import struct

from tests.fuzz.mutators import JSON, ODD_NAMES, ODD_VALUES, Mutator, written

DTYPES = ("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "f32", "", "X")


def header_length(rng: random.Random, data: bytes) -> bytes:
    n = int.from_bytes(data[:8], "little")
    odd = (
        0,
        1,
        n - 1,
        n + 1,
        n + 8,
        len(data) - 8,
        len(data),
        2**31,
        2**63,
        2**64 - 1,
        100 * 2**20,
    )
    return struct.pack("<Q", rng.choice(odd)) + data[8:]


def header_json(rng: random.Random, data: bytes) -> bytes:
    """The header's JSON changed by one of the mutators of JSON, its length set right."""
    head, body = split(data)
    return joined(rng.choice(JSON)(rng, head), body)


def header_entry(rng: random.Random, data: bytes) -> bytes:
    """One tensor's entry: its dtype, its shape, its place, its name."""
    head, body = split(data)
    entries = json.loads(head)
    names = [name for name in entries if name != "__metadata__"]
    name = rng.choice(names)
    entry = entries[name]
    start, stop = entry["data_offsets"]
    what = rng.randrange(8)
    if what == 0:
        entry["dtype"] = rng.choice(DTYPES)
    elif what == 1:
        entry["shape"] = entry["shape"][::-1]
    elif what == 2:
        entry["shape"] = rng.choice(([], [0], [-1], [2**40], [2**32, 2**32], [1] * 9, [1.0], ["1"]))
    elif what == 3:
        odd = (0, -1, start + 1, stop, stop + 4, len(body), 2**63, 2**64)
        entry["data_offsets"] = [rng.choice(odd), rng.choice(odd)]
    elif what == 4:
        entry["data_offsets"] = entries[rng.choice(names)]["data_offsets"]
    elif what == 5:
        entries[rng.choice((*ODD_NAMES, name + ".weight", name[:-1]))] = entries.pop(name)
    elif what == 6:
        entries[rng.choice(ODD_NAMES) + "x"] = {**entry, "shape": [0], "data_offsets": [stop, stop]}
    else:
        del entries[name]
    return joined(written(entries), body)


def header_many(rng: random.Random, data: bytes) -> bytes:
    """Thousands of empty tensors behind the real ones."""
    head, body = split(data)
    entries = json.loads(head)
    end = len(body)
    nothing = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
    entries |= {f"t{number}": nothing for number in range(rng.choice((100, 2000)))}
    return joined(written(entries), body)


def header_same(rng: random.Random, data: bytes) -> bytes:
    """Another header that says the same: in another order, with spaces, with metadata."""
    head, body = split(data)
    entries = json.loads(head)
    names = list(entries)
    rng.shuffle(names)
    metadata = {"__metadata__": {"format": "pt", "note": "x"}} if rng.random() < 0.5 else {}
    return joined(written({name: entries[name] for name in names} | metadata) + b" " * 8, body)


def metadata(rng: random.Random, data: bytes) -> bytes:
    """One text of the metadata: changed as JSON where it is some, or another text, or none."""
    head, body = split(data)
    entries = json.loads(head)
    texts = entries["__metadata__"]
    name = rng.choice(list(texts))
    if texts[name][:1] == "{" and rng.random() < 0.8:
        texts[name] = rng.choice(JSON)(rng, texts[name].encode()).decode("utf-8", "replace")
    elif rng.random() < 0.5:
        texts[name] = rng.choice(ODD_VALUES)
    else:
        entries["__metadata__"] = rng.choice((*ODD_VALUES, {**texts, "more": "x"}))
    return joined(written(entries), body)


def wild_numbers(rng: random.Random, data: bytes) -> bytes:
    """NaN, infinities and denormal numbers among the tensors'."""
    head, body = split(data)
    at = 4 * rng.randrange(len(body) // 4)
    value = rng.choice((b"\xff" * 4, struct.pack("<f", float("inf")), b"\0\0\x80\xff", b"\1\0\0\0"))
    return joined(head, body[:at] + value + body[at + 4 :])


SAFETENSORS: tuple[Mutator, ...] = (
    header_length, header_json, header_json, header_entry, header_entry, header_entry, header_many,
    header_same, metadata, metadata, wild_numbers,
)  # fmt: skip


def split(data: bytes) -> tuple[bytes, bytes]:
    """A safetensors file's header and what follows it."""
    stop = 8 + int.from_bytes(data[:8], "little")
    return data[8:stop], data[stop:]


def joined(head: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(head)) + head + body
