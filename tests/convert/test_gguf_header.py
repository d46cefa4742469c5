"""GGUF headers from outside: read rightly, or refused with one message and no memory taken."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sidepath.convert.gguf_header import read_gguf_header
from sidepath.errors import SidepathError, StoreError
from sidepath.store.loading import load_tensors
from sidepath.store.tensors import Limits


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of the gguf package's, with keys of every kind."""
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.uint32", 7)
    writer.add_int64("a.int64", -7)
    writer.add_float64("a.float64", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "größer")
    writer.add_array("a.texts", ["x", "yz"])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_tensor("one", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("two", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_what_the_package_wrote(good: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(good)
    keys, header = read_gguf_header(tmp_path / "x.gguf")
    assert keys["general.architecture"] == "llama"
    names = ("uint32", "int64", "float64", "bool", "string", "texts", "numbers")
    assert [keys[f"a.{name}"] for name in names] == [7, -7, 0.5, True, "größer", None, None]
    tensors = load_tensors(tmp_path / "x.gguf", header)
    assert tensors["one"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensors["two"].tolist() == [0, 1, 2, 3, 4]


def text(name: str) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode()


def raw(
    tensors: list[tuple[str, tuple[int, ...], int, int]],
    *,
    keys: bytes = b"",
    key_count: int = 0,
    count: int | None = None,
    data: bytes = b"",
    version: int = 3,
) -> bytes:
    """A file by hand."""
    number = len(tensors) if count is None else count
    head = b"GGUF" + struct.pack("<IQQ", version, number, key_count) + keys
    for name, sizes, kind, offset in tensors:
        head += text(name) + struct.pack("<I", len(sizes))
        head += b"".join(struct.pack("<Q", size) for size in sizes)
        head += struct.pack("<IQ", kind, offset)
    return head + bytes(-len(head) % 32) + data


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


BAD: dict[str, tuple[bytes, str]] = {
    "another magic": (b"GGML" + bytes(30), "does not begin"),
    "nothing": (b"", "truncated"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(16), "little-endian"),
    "2**60 tensors": (raw([], count=2**60), "at most 100000"),
    "2**60 keys": (raw([], key_count=2**60), "at most"),
    "a text of 2**60 bytes": (raw([], key_count=1, keys=struct.pack("<Q", 2**60)), "truncated"),
    "a list of 2**60 texts": (
        raw([], key_count=1, keys=key("a", 9, struct.pack("<IQ", 8, 2**60))),
        "does not fit",
    ),
    "a list of 2**60 numbers": (
        raw([], key_count=1, keys=key("a", 9, struct.pack("<IQ", 10, 2**60))),
        "truncated",
    ),
    "a list of lists": (
        raw([], key_count=1, keys=key("a", 9, struct.pack("<IQ", 9, 1))),
        "a list of type 9",
    ),
    "an unknown value": (raw([], key_count=1, keys=key("a", 99, b"")), "type 99"),
    "a key twice": (raw([], key_count=2, keys=key("a", 0, b"1") * 2), "comes twice"),
    "no text": (raw([], key_count=1, keys=key("a", 8, struct.pack("<Q", 1) + b"\xff")), "utf-8"),
    "an odd alignment": (
        raw([], key_count=1, keys=key("general.alignment", 4, struct.pack("<I", 24))),
        "power of two",
    ),
    "99 dimensions": (raw([("a", (1,) * 99, 0, 0)]), "99 dimensions"),
    "2**60 elements": (raw([("a", (2**30, 2**30), 0, 0)]), "elements"),
    "packed numbers": (raw([("a", (256,), 2, 0)], data=bytes(144)), "type 2"),
    "two of one name": (
        raw([("a", (8,), 0, 0), ("a", (8,), 0, 32)], data=bytes(64)),
        "comes twice",
    ),
    "overlapping": (raw([("a", (8,), 0, 0), ("b", (8,), 0, 0)], data=bytes(64)), "begins at"),
    "outside": (raw([("a", (8,), 0, 2**50)], data=bytes(32)), "begins at"),
    "truncated data": (raw([("a", (8,), 0, 0)], data=bytes(31)), "truncated"),
    "something behind": (raw([("a", (8,), 0, 0)], data=bytes(64)), "after the last"),
}


@pytest.mark.parametrize("kind", BAD)
def test_refused(kind: str, tmp_path: Path) -> None:
    content, said = BAD[kind]
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(StoreError, match=said):
        read_gguf_header(tmp_path / "x.gguf")


def test_limits_and_files_that_are_none(good: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(good)
    with pytest.raises(StoreError, match="too long"):
        read_gguf_header(tmp_path / "x.gguf", Limits(header_bytes=64))
    with pytest.raises(StoreError):
        read_gguf_header(tmp_path)
    with pytest.raises(StoreError, match="No such file"):
        read_gguf_header(tmp_path / "none")


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_mutated_files(data: st.DataObject, good: bytes, tmp_path: Path) -> None:
    """Bytes changed, cut off or put in anywhere: one message of ours, or tensors that are there."""
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["change", "cut", "insert", "large"]))
        if kind == "change":
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[max(at, 1) :]
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(max_size=9))
        else:
            content[at : at + 8] = struct.pack("<Q", 2**63 - 1)
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    try:
        _, header = read_gguf_header(path)
        tensors = load_tensors(path, header)
    except SidepathError:
        return
    assert sum(tensor.numel() for tensor in tensors.values()) * 2 <= len(content)
