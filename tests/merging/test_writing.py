"""Files that are written tensor by tensor are those that safetensors writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sidepath.merging.mapped import Mapped, Place
from sidepath.merging.writing import DTYPES, Entry, write_file, write_index
from sidepath.store.tensors import read_header

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
PLAIN = [dtype for dtype in DTYPES if dtype not in (torch.uint64, torch.uint32, torch.uint16)]


def some(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape) * 3).to(dtype)


def entry(name: str, tensor: Tensor, place: Place | None = None) -> Entry:
    return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: tensor, place)


def bits(tensor: Tensor) -> list[int]:
    return list(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


@given(st.lists(st.tuples(SHAPES, st.sampled_from(PLAIN)), max_size=6))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, kinds: list) -> None:  # type: ignore[type-arg]
    path = tmp_path_factory.mktemp("w") / "x.safetensors"
    tensors = {f"t{at}": some(shape, dtype) for at, (shape, dtype) in enumerate(kinds)}
    write_file(path, [entry(name, tensor) for name, tensor in tensors.items()])
    found = load_file(path)
    assert {n: (t.dtype, t.shape, bits(t)) for n, t in found.items()} == {
        n: (t.dtype, t.shape, bits(t)) for n, t in tensors.items()
    }
    header = read_header(path, floating_only=False)
    assert all(info.start % tensors[name].itemsize == 0 for name, info in header.items())


def test_turned_tensors_are_written_row_by_row(tmp_path: Path) -> None:
    turned = torch.arange(6.0).reshape(2, 3).T
    write_file(tmp_path / "x.safetensors", [entry("t", turned)])
    assert torch.equal(load_file(tmp_path / "x.safetensors")["t"], turned)


def test_what_lies_in_a_file_is_copied_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbours in one go, and nothing of them is made."""
    import os

    tensors = {name: torch.randn(3, 5) for name in "abcd"}
    save_file(tensors, tmp_path / "base.safetensors")
    header = read_header(tmp_path / "base.safetensors")
    sent: list[tuple[int, int]] = []
    sendfile = os.sendfile

    def counted(out: int, source: int, start: int, size: int) -> int:
        sent.append((start, size))
        return sendfile(out, source, start, min(size, 50))  # the kernel may send less

    monkeypatch.setattr(os, "sendfile", counted)
    new = torch.randn(3, 5)

    def never() -> Tensor:
        raise AssertionError("made")

    entries = [
        Entry(name, torch.float32, (3, 5), never, Place(tmp_path / "base.safetensors", info.start))
        for name, info in header.items()
    ]
    entries[2] = entry("c", new)
    write_file(tmp_path / "out.safetensors", entries)
    found = load_file(tmp_path / "out.safetensors")
    assert {name: bits(found[name]) for name in "abd"} == {n: bits(tensors[n]) for n in "abd"}
    assert torch.equal(found["c"], new)
    assert sent[0] == (header["a"].start, 120)
    assert [start for start, _ in sent] == [
        header["a"].start, header["a"].start + 50, header["a"].start + 100,
        header["d"].start, header["d"].start + 50,
    ]  # fmt: skip


def test_a_base_that_is_cut_short_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"1234")
    short = Entry("t", torch.float32, (9,), lambda: torch.ones(9), Place(tmp_path / "base", 0))
    with pytest.raises(OSError, match="became shorter"):
        write_file(tmp_path / "out", [short])


def test_the_index_counts_what_was_written(tmp_path: Path) -> None:
    one, two = entry("b", torch.ones(2, dtype=torch.bfloat16)), entry("a", torch.ones(3))
    files = {"x.safetensors": [one], "y.safetensors": [two]}
    write_index(tmp_path / "i", {"total_size": 1, "total_parameters": 1, "kept": "yes"}, files)
    assert json.loads((tmp_path / "i").read_text()) == {
        "metadata": {"total_size": 16, "total_parameters": 5, "kept": "yes"},
        "weight_map": {"a": "y.safetensors", "b": "x.safetensors"},
    }


def test_a_mapped_tensor_is_found_in_its_file(tmp_path: Path) -> None:
    tensors = {name: torch.randn(700, 9) for name in "abc"}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    header = read_header(path)
    with safe_open(path, "pt") as file:
        seen = {name: file.get_tensor(name) for name in "abc"}
    mapped = Mapped([path])
    for name, tensor in seen.items():
        assert mapped.place(tensor) == Place(path, header[name].start)
        assert mapped.place(tensor[3:]) == Place(path, header[name].start + 3 * 9 * 4)
        assert mapped.place(tensor.T) is None
        assert mapped.place(tensor.clone()) is None
        mapped.release(tensor)
        mapped.release(tensor.clone())
        assert torch.equal(tensor, tensors[name]), "pages come again when they are read"
    assert Mapped([tmp_path / "another"]).place(seen["a"]) is None
