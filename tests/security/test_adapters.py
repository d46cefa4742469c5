"""Attacks by what is to be loaded, and by loading while others are answered."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.security.conftest import Server

pytestmark = pytest.mark.filterwarnings("ignore:.*its base could not be verified")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def folder(server: Server) -> Iterator[Path]:
    """A copy of an adapter below the root, for a test to spoil: without our manifest, as PEFT's."""
    place = server.root / "spoilt"
    shutil.copytree(server.root / "0", place)
    (place / "sidepath.json").unlink()
    yield place
    shutil.rmtree(place)


def refused(server: Server, *words: str, path: str = "spoilt", name: str = "spoilt") -> None:
    """Loading it is a 400 that says why; nothing has changed, and all goes on."""
    before = server.text("tenant-model")
    for inplace in (False, True):
        reply = server.load(name, path, load_inplace=inplace)
        assert reply.status == 400, reply.text
        for word in words:
            assert word in reply.error["message"]
    assert server.names() == ["tenant-model"]
    assert server.text("tenant-model") == before


@pytest.mark.parametrize(
    "path",
    ["..", "../made/adapter-0", "0/../../made/adapter-0", "/etc", "/", "{outside}", "~", "0\0", ""],
)
def test_paths_that_lead_out(server: Server, path: str) -> None:
    outside = server.root.parent / "made" / "adapter-0"
    assert outside.is_dir()
    refused(server, path=path.format(outside=outside))


def test_links_that_lead_out(server: Server, folder: Path) -> None:
    outside = server.root.parent / "made" / "adapter-0"
    link = server.root / "link"
    link.symlink_to(outside)
    try:
        refused(server, "does not lead", path="link")
    finally:
        link.unlink()
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(outside / WEIGHTS)
    refused(server, f"{WEIGHTS} is a link")


class Bomb:
    """Would leave a file where it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return Path.touch, (self.place,)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", WEIGHTS])
def test_pickles(server: Server, folder: Path, tmp_path: Path, name: str) -> None:
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    refused(server, "safetensors")
    assert not (tmp_path / "exploded").exists()
    pickle.loads((folder / name).read_bytes())
    assert (tmp_path / "exploded").exists(), "the bomb is one"


def test_a_header_that_promises_too_much(server: Server, folder: Path) -> None:
    for length in (2**63 - 1, 2**40, 9 * 2**20):
        (folder / WEIGHTS).write_bytes(length.to_bytes(8, "little") + b"{" * 100)
        refused(server, WEIGHTS)
    deep = b"[" * 100_000
    (folder / WEIGHTS).write_bytes(len(deep).to_bytes(8, "little") + deep)
    refused(server, WEIGHTS)
    (folder / CONFIG).write_bytes(b'{"r": ' + b"[" * 100_000)
    refused(server)


def test_huge_ranks(server: Server, folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "r": 2**40, "rank_pattern": {}}))
    refused(server)
    (folder / CONFIG).write_text(json.dumps(config))
    tensors = load_file(folder / WEIGHTS)
    grown = {
        key: torch.zeros(64, value.shape[1]) if "lora_A" in key else torch.zeros(len(value), 64)
        for key, value in tensors.items()
    }
    save_file(grown, folder / WEIGHTS)
    refused(server, "rank 64, at most 16")
    header = {"a.lora_A.weight": {"dtype": "F32", "shape": [2**50, 1], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    refused(server)


def test_folders_larger_than_allowed(server: Server, folder: Path) -> None:
    with open(folder / "README.md", "wb") as file:
        file.truncate(2**20 + 1)
    refused(server, "at most 1,048,576")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers(server: Server, folder: Path, value: float) -> None:
    tensors = load_file(folder / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = value
    save_file(tensors, folder / WEIGHTS)
    refused(server, "NaN or Inf")


def test_a_flipped_bit_of_a_folder_of_ours(server: Server) -> None:
    place = server.root / "flipped"
    shutil.copytree(server.root / "0", place)
    try:
        raw = bytearray((place / WEIGHTS).read_bytes())
        raw[-3] ^= 1
        (place / WEIGHTS).write_bytes(raw)
        refused(server, "not those that were saved", path="flipped")
    finally:
        shutil.rmtree(place)


@pytest.mark.parametrize("name", ["a/b", "..", "", "a\nb", "x" * 65, "serving 1"])
def test_names_against_the_rules(server: Server, name: str) -> None:
    refused(server, path="0", name=name)


def test_names_that_are_taken(server: Server) -> None:
    before, base = server.text("tenant-model"), server.text("base")
    for name, more in (("base", {}), ("base", {"load_inplace": True}), ("tenant-model", {})):
        reply = server.load(name, "1", **more)
        assert (reply.status, reply.error["code"]) == (409, "name_taken")
    assert (server.text("tenant-model"), server.text("base")) == (before, base)
    # What versions are called on the model is no name that anybody can take.
    assert server.load("serving-1", "1").status == 200
    assert server.text("tenant-model") == before
    assert server.unload("serving-1").status == 200


def test_reloads_under_load_answer_by_one_version_each(server: Server) -> None:
    """Every answer is one version's from its first token to its last, and never the base's."""
    expected = {}
    for path in ("0", "1"):
        assert server.load("swapped", path, load_inplace=True).status == 200
        expected[path] = server.text("swapped")
    assert len({*expected.values(), server.text("base")}) == 3
    found: list[str] = []
    done = threading.Event()

    def asking() -> None:
        while not done.is_set():
            found.append(server.text("swapped"))

    callers = [threading.Thread(target=asking) for _ in range(3)]
    for caller in callers:
        caller.start()
    try:
        for number in range(12):
            reply = server.load("swapped", str(number % 2), load_inplace=True)
            assert reply.status == 200
            assert server.text("swapped") == expected[str(number % 2)]
    finally:
        done.set()
        for caller in callers:
            caller.join()
    assert len(found) >= 3
    assert set(found) <= set(expected.values())
    assert server.unload("swapped").document["gone"] is True
    assert server.complete("swapped").status == 404
