"""One file appears whole or not at all."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from sidepath.errors import StoreError, WriteFailed
from sidepath.store.file import publish_file
from tests.faults import Faults


def write(path: Path, content: bytes, *, overwrite: bool = True) -> None:
    with publish_file(path, overwrite=overwrite) as file, open(file, "wb") as opened:
        opened.write(content)


def test_written_whole_with_its_parents(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "x.bin", b"new")
    assert (tmp_path / "a" / "b" / "x.bin").read_bytes() == b"new"
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["x.bin"]


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    write(tmp_path / "x.bin", b"old")
    with pytest.raises(StoreError, match="there already"):
        write(tmp_path / "x.bin", b"new", overwrite=False)
    assert (tmp_path / "x.bin").read_bytes() == b"old"
    with pytest.raises(StoreError, match="is a folder"):
        write(tmp_path, b"new")


def test_an_error_in_the_block_leaves_nothing(tmp_path: Path) -> None:
    def half() -> None:
        with publish_file(tmp_path / "made" / "x.bin") as file:
            file.write_bytes(b"half")
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        half()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", [False, True])
def test_the_nth_file_operation_fails(there: bool, tmp_path: Path) -> None:
    """Until a clean run: the old file or the new one, an error of ours, and no orphan."""
    for number in itertools.count(1):
        place = tmp_path / str(number)
        place.mkdir()
        target = place / "x.bin"
        if there:
            target.write_bytes(b"old")
        with Faults(number, under=place) as faults:
            try:
                write(target, b"new" * 1000)
            except WriteFailed:
                assert faults.hit
        if not faults.hit:
            assert number > 5
            assert target.read_bytes() == b"new" * 1000
            return
        content = target.read_bytes() if target.exists() else None
        assert content in ((b"old", b"new" * 1000) if there else (None, b"new" * 1000))
        write(target, b"again")
        assert [path.name for path in place.iterdir()] == ["x.bin"]
        assert target.read_bytes() == b"again"


def test_a_file_of_any_name_is_replaced(tmp_path: Path) -> None:
    for content in (b"old", b"new"):
        write(tmp_path / "x.before", content)
    assert (tmp_path / "x.before").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["x.before"]
