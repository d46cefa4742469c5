"""Files from outside are checked before memory is allocated for them."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from sidepath.errors import DamagedAdapter, StoreError
from sidepath.store.loading import load_tensors
from sidepath.store.tensors import (
    Limits,
    file_inside,
    read_header,
    read_json,
    refuse_pickle,
    strict_json,
)


def raw(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[Any], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_reads_what_safetensors_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "a": torch.randn(3, 4).to(dtype),
        "b": torch.randn(2).to(dtype),
        "c": torch.tensor(1.5),
    }
    save_file(tensors, tmp_path / "t.safetensors", metadata={"format": "pt"})
    found = load_tensors(tmp_path / "t.safetensors", read_header(tmp_path / "t.safetensors"))
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "short": (b"\x01\x00", "truncated"),
    "header longer than the file": (struct.pack("<Q", 2**62) + b"{}", "truncated"),
    "not JSON": (raw(b"{oops"), "not JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not JSON"),
    "not an object": (raw([1]), "not a JSON object"),
    "nested deeply": (raw(b"[" * 100_000), "not JSON"),
    "huge number": (raw(b'{"a": ' + b"9" * 5000 + b"}"), "not JSON"),
    "duplicate keys": (raw(b'{"a": 1, "a": 2}'), "duplicate keys a"),
    "metadata": (raw({"__metadata__": 3}), "__metadata__"),
    "fields": (raw({"a": {"dtype": "F32"}}), "a: expected dtype, shape"),
    "integers": (raw({"a": entry([2], 0, 16, "I64")}, bytes(16)), "dtype I64"),
    "no such dtype": (raw({"a": entry([2], 0, 16, "X9")}, bytes(16)), "dtype X9"),
    "dtype no text": (raw({"a": entry([2], 0, 16) | {"dtype": 3}}, bytes(16)), "dtype 3"),
    "rank": (raw({"a": entry([1] * 9, 0, 4)}, bytes(4)), "at most 8 sizes"),
    "negative size": (raw({"a": entry([-1], 0, 4)}, bytes(4)), "shape"),
    "boolean size": (raw({"a": entry([True], 0, 4)}, bytes(4)), "shape"),
    "absurd size": (raw({"a": entry([2**40, 2**40], 0, 4)}, bytes(4)), "elements"),
    "bytes for shape": (raw({"a": entry([2], 0, 4)}, bytes(4)), "4 bytes for shape"),
    "offsets": (raw({"a": entry([2], 8, 0)}, bytes(8)), "data_offsets"),
    "offsets no numbers": (raw({"a": entry([2], 0, 8) | {"data_offsets": "08"}}), "data_offsets"),
    "gap": (raw({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)), "gap or an overlap"),
    "overlap": (raw({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, bytes(8)), "gap or an overlap"),
    "truncated data": (raw({"a": entry([4], 0, 16)}, bytes(15)), "truncated"),
    "trailing bytes": (raw({"a": entry([4], 0, 16)}, bytes(17)), "1 bytes after"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_before_anything_is_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    data, message = BAD[name]
    (tmp_path / "t.safetensors").write_bytes(data)

    def allocate(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("memory was allocated")

    monkeypatch.setattr(torch, "empty", allocate)
    with pytest.raises(DamagedAdapter, match=message):
        read_header(tmp_path / "t.safetensors")


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    header = {"a": entry([1], 0, 8, "I64"), "b": entry([1] * 9, 8, 12), "c": entry([3], 12, 16)}
    (tmp_path / "t.safetensors").write_bytes(raw(header, bytes(16)))
    with pytest.raises(DamagedAdapter) as caught:
        read_header(tmp_path / "t.safetensors")
    assert [fault[0] for fault in caught.value.faults] == ["a", "b", "c"]


def test_the_header_and_the_number_of_tensors_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 8 * 2**20 + 1))
        file.truncate(9 * 2**20)
    with pytest.raises(DamagedAdapter, match=r"8388609 bytes, at most 8388608"):
        read_header(path)
    one = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = b"{" + b",".join(b'"%d":%s' % (i, one) for i in range(100_001)) + b"}"
    path.write_bytes(raw(text))
    with pytest.raises(DamagedAdapter, match=r"100001 tensors, at most 100000"):
        read_header(path)
    path.write_bytes(raw({f"{i}": entry([0], 0, 0) for i in range(11)}))
    with pytest.raises(DamagedAdapter, match=r"11 tensors, at most 10"):
        read_header(path, limits=Limits(tensors=10))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_counted(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    good, bad = torch.zeros(4, dtype=dtype), torch.zeros(6, dtype=dtype)
    bad[2:4] = value
    save_file({"good": good, "bad": bad}, tmp_path / "t.safetensors")
    header = read_header(tmp_path / "t.safetensors")
    with pytest.raises(DamagedAdapter, match="bad: 2 of 6 values are NaN or Inf") as caught:
        load_tensors(tmp_path / "t.safetensors", header)
    assert len(caught.value.faults) == 1


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_damage_to_the_header_is_refused_or_harmless(data: st.DataObject) -> None:
    good = save({"a": torch.ones(2, 3), "b": torch.ones(4)})
    length = int.from_bytes(good[:8], "little")
    at = data.draw(st.integers(0, 8 + length - 1))
    changed = bytearray(good)
    changed[at] ^= 1 << data.draw(st.integers(0, 7))
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"sidepath-{os.getpid()}.safetensors"
    path.write_bytes(changed)
    try:
        found = load_tensors(path, read_header(path))
        assert sum(tensor.numel() for tensor in found.values()) == 10
    except DamagedAdapter:
        pass
    finally:
        path.unlink()


@pytest.mark.parametrize("name", ["x.bin", "x.pt", "X.CKPT", "x.pkl", "x.pth"])
def test_pickles_are_refused_with_the_line_that_converts_them(name: str) -> None:
    with pytest.raises(StoreError, match=r"(?s)never loaded.*safetensors\.torch\.save_file"):
        refuse_pickle(name)


def test_only_files_inside_the_folder_are_read(tmp_path: Path) -> None:
    home, outside = tmp_path / "home", tmp_path / "outside"
    home.mkdir()
    outside.write_text("secret")
    (home / "link").symlink_to(outside)
    (home / "own").write_text("own")
    (home / "alias").symlink_to(home / "own")
    assert file_inside(home, "own").read_text() == "own"
    assert file_inside(home, "alias").read_text() == "own"
    for name in ("link", "../outside", str(outside)):
        with pytest.raises(DamagedAdapter, match="leads out of its folder"):
            file_inside(home, name)
    os.mkfifo(home / "pipe")
    for name in ("missing", "pipe", "."):
        with pytest.raises(DamagedAdapter, match="missing"):
            file_inside(home, name)


def test_a_snapshot_of_the_hub_cache_may_link_to_its_blobs(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_text("weights")
    (snapshot / "w").symlink_to(Path("../../blobs/123"))
    assert file_inside(snapshot, "w").read_text() == "weights"


def test_strict_json() -> None:
    assert strict_json(b'{"a": [1, 2.5, null]}') == {"a": [1, 2.5, None]}
    for text in (b'{"a": 1, "a": 1}', b"[", b"", b"[" * 100_000):
        with pytest.raises(ValueError):
            strict_json(text)


@pytest.mark.parametrize("one", [b"[],", b"{},", b"0,", b'"",'])
def test_values_that_would_take_many_times_their_text_are_not_parsed(
    one: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(ValueError, match="more values"):
        strict_json(b"[" + one * 3_100_000 + b"0]")


def test_a_file_of_an_absurd_size_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    os.truncate(tmp_path / "a.json", 2**40)
    with pytest.raises(ValueError, match="at most"):
        read_json(tmp_path / "a.json")


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(ValueError, match="regular file"):
        read_json(tmp_path / "a.json")


def test_a_million_empty_tensors_are_refused_by_the_headers_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Safetensors takes the better part of a minute for this file."""
    each = json.dumps(entry([0], 0, 0))
    header = ",".join(f'"t{number}":{each}' for number in range(1_000_000)).encode()
    whole = b"{" + header + b"}"
    (tmp_path / "a.safetensors").write_bytes(len(whole).to_bytes(8, "little") + whole)
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(DamagedAdapter, match="at most 8388608"):
        read_header(tmp_path / "a.safetensors")
