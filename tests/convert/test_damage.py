"""Every format's files damaged in every way: one message, nothing written."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sidepath.convert.formats import FORMATS, convert, format_of
from sidepath.convert.portable import Base
from sidepath.errors import ConfigError, DamagedAdapter, SidepathError, StoreError, WriteFailed
from tests.faults import Faults

from .conftest import biased_llama
from .made import KINDS, made, options

FILES = {name: one for name, one in FORMATS.items() if not one.folder}


@pytest.fixture(scope="module")
def written(llama: Base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same adapter in every format; a test copies what it damages."""
    place = tmp_path_factory.mktemp("written")
    folder, _ = made(biased_llama, place / "sidepath", **KINDS["plain"])
    found = {"sidepath": folder}
    for name in FORMATS:
        if name != "sidepath":
            convert(folder, place / name, name, options=options(llama))
            found[name] = place / name
    return found


def files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.iterdir())


def copied(path: Path, to: Path) -> Path:
    """A copy of a file, or of a folder of files."""
    if path.is_file():
        to.write_bytes(path.read_bytes())
        return to
    to.mkdir()
    for one in path.iterdir():
        (to / one.name).write_bytes(one.read_bytes())
    return to


@pytest.mark.parametrize("name", FORMATS)
def test_each_file_cut_short(name: str, written: dict[str, Path], tmp_path: Path) -> None:
    for number, file in enumerate(files_of(written[name])):
        if file.name == "README.md" and name != "sidepath":
            continue
        damaged = copied(written[name], tmp_path / f"{number}")
        inside = damaged if damaged.is_file() else damaged / file.name
        inside.write_bytes(inside.read_bytes()[:-7])
        with pytest.raises(SidepathError):
            convert(damaged, tmp_path / "out", "sidepath", source_format=name)
    assert not (tmp_path / "out").exists()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_mutated(data: st.DataObject, written: dict[str, Path], tmp_path_factory: Any) -> None:
    """Bytes changed anywhere: an error of ours, or an adapter of the same names and shapes."""
    name = data.draw(st.sampled_from([name for name in FORMATS if name != "sidepath"]))
    place = tmp_path_factory.mktemp("mutated")
    damaged = copied(written[name], place / "damaged")
    file = data.draw(st.sampled_from(files_of(damaged)))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(1, len(content) - 1)) :]
    file.write_bytes(content)
    try:
        found = convert(damaged, place / "out", "sidepath", source_format=name)
    except SidepathError:
        assert not (place / "out").exists()
        return
    assert found.portable.updates()


@pytest.mark.parametrize("name", [*FILES, "mlx"])
def test_numbers_changed_on_the_way_are_told_or_kept(
    name: str, written: dict[str, Path], tmp_path: Path
) -> None:
    """NaN in a tensor is refused in every format."""
    damaged = copied(written[name], tmp_path / "damaged")
    file = damaged if damaged.is_file() else damaged / "adapters.safetensors"
    content = bytearray(file.read_bytes())
    # The last float32 of the file, whatever the format: all of them end with tensors.
    end = len(content.rstrip(b"\0"))
    end += -end % 4
    content[end - 4 : end] = b"\x00\x00\xc0\x7f"
    file.write_bytes(content)
    with pytest.raises(DamagedAdapter, match=r"finite|NaN"):
        convert(damaged, tmp_path / "out", "sidepath", source_format=name)


@pytest.mark.parametrize("name", ["loralib", "kohya", "diffusers"])
def test_a_passport_that_does_not_fit(name: str, written: dict[str, Path], tmp_path: Path) -> None:
    with safe_open(written[name], "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(written[name])
    passport = json.loads(metadata["sidepath"])
    shapes = {**passport["tensors"]}
    first, (_, shape) = next(iter(shapes.items()))
    changes: dict[str, tuple[Any, str]] = {
        "no JSON": ("{", "not JSON"),
        "a list": ([], "expected a table"),
        "another field": ({**passport, "more": 1}, "expected a table"),
        "a shape": ({**passport, "tensors": {**shapes, first: ["F32", [9, 9]]}}, "expected"),
        "a dtype": ({**passport, "tensors": {**shapes, first: ["I8", shape]}}, "a data type"),
        "narrower": ({**passport, "tensors": {**shapes, first: ["F16", shape]}}, "F16"),
        "no matrix": ({**passport, "tensors": {**shapes, first: ["F32", []]}}, "a matrix"),
        "no ASCII": ({**passport, "tensors": {**shapes, "layers.²": ["F32", [1]]}}, "ASCII"),
        "no settings": ({**passport, "adapter_config": 3}, "not a JSON object"),
        "a tensor more": ({**passport, "tensors": {**shapes, "x.bias": ["F32", [1]]}}, "missing"),
        "no manifest": ({**passport, "manifest": {"format": 1}}, "malformed"),
        "another version": ({**passport, "manifest": {"format": 9}}, "this version reads"),
    }
    for kind, (value, said) in changes.items():
        text = value if isinstance(value, str) else json.dumps(value)
        path = tmp_path / f"{kind}.safetensors"
        save_file(tensors, path, metadata={**metadata, "sidepath": text})
        with pytest.raises(DamagedAdapter, match=said):
            convert(path, tmp_path / "out", "sidepath")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["mlx", "kohya", "sidepath"])
def test_the_nth_file_operation_fails(
    name: str, written: dict[str, Path], llama: Base, tmp_path: Path
) -> None:
    """Until a clean run: nothing or all of it, an error of ours, no orphan after the next run.

    Every fifth; one by one: `test_folder.py` and `test_file.py`, whose code it is.
    """
    for number in itertools.count(1, 5):
        place = tmp_path / str(number)
        place.mkdir()
        target = place / "out"
        with Faults(number, under=place) as faults:
            try:
                convert(written["peft"], target, name, options=options(llama))
            except WriteFailed:
                assert faults.hit
        if not faults.hit:
            assert number > 5
            return
        if target.exists():
            assert format_of(target) == name
        convert(written["peft"], target, name, options=options(llama), overwrite=True)
        assert [path.name for path in place.iterdir()] == ["out"]


def test_no_format_at_all(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such adapter"):
        format_of(tmp_path / "nothing")
    with pytest.raises(StoreError, match="no format that is known"):
        format_of(tmp_path)
    save_file({"weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(StoreError, match="no format that is known"):
        format_of(tmp_path / "x.safetensors")
    (tmp_path / "x.bin").write_bytes(b"PK")
    with pytest.raises(StoreError, match="pickle"):
        format_of(tmp_path / "x.bin")
    with pytest.raises(ConfigError, match="unknown format"):
        convert(tmp_path / "x.safetensors", tmp_path / "out", "onnx")


@pytest.mark.parametrize("what", ["fifo", "link"])
def test_what_stands_in_a_folder_of_diffusers(what: str, tmp_path: Path) -> None:
    """Nothing is waited for, and no link leads out."""
    inside = tmp_path / "folder" / "pytorch_lora_weights.safetensors"
    inside.parent.mkdir()
    if what == "fifo":
        os.mkfifo(inside)
    else:
        save_file({"x": torch.zeros(2)}, tmp_path / "outside.safetensors")
        inside.symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(DamagedAdapter, match=r"missing|leads out"):
        convert(inside.parent, tmp_path / "out", "sidepath", source_format="diffusers")
