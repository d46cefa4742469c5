"""A merge that fails or is killed at any moment leaves the old folder or the new one, whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from sidepath.errors import SidepathError
from sidepath.merging.merge import merge_folder
from sidepath.methods.lora import LoRA
from sidepath.store.adapter import inject
from sidepath.store.folder import sha256_file
from tests.conftest import randomise, tiny_llama
from tests.faults import KILLED, Faults, ended, forked, full_disk, started
from tests.merging.whole import tensors_in

pytestmark = pytest.mark.filterwarnings("ignore:.*PARITY NOT MEASURED")
NAMES = ("old", "new")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded base, and two adapters of it."""
    from transformers import LlamaForCausalLM

    place = tmp_path_factory.mktemp("source")
    tiny_llama(layers=1).bfloat16().save_pretrained(place / "base", max_shard_size="20kB")  # type: ignore[operator]
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        model = LlamaForCausalLM.from_pretrained(place / "base").eval()
        made = inject(model, LoRA(r=2, targets=("q_proj", "up_proj")), "x")
        randomise(made.parameters(), 0.2)
        made.save(place / name)
    return place


@pytest.fixture
def place(tmp_path: Path, source: Path) -> Path:
    """A folder in which `out` holds the old merge, and nothing else lies."""
    (tmp_path / "place").mkdir()
    merged(source, tmp_path / "place", "old")
    return tmp_path / "place"


def merged(source: Path, place: Path, name: str, *, skip_parity: bool = True) -> None:
    merge_folder(source / "base", [source / name], place / "out", skip_parity=skip_parity)


def state(place: Path) -> str | None:
    """Whose merge `out` is, every file of it as it was written; None when there is none."""
    folder = place / "out"
    if not folder.exists():
        return None
    record = json.loads((folder / "parity.json").read_text())
    assert {*record["files"], "parity.json"} == set(os.listdir(folder))
    assert all(sha256_file(folder / name) == digest for name, digest in record["files"].items())
    assert len(tensors_in(folder)) == 12
    return str(record["adapters"][0]["name"])


def operations(source: Path, place: Path, **more: bool) -> list[str]:
    with Faults(0, under=place) as faults:
        merged(source, place, "new", **more)
    merged(source, place, "old")
    return faults.names


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("first", [False, True])
def test_each_file_operation_fails_once(
    tmp_path: Path, source: Path, first: bool, step: int
) -> None:
    """Every `step`-th of them."""
    place = tmp_path / "place"
    place.mkdir()
    merged(source, place, "old")
    if first:
        (place / "out").rename(tmp_path / "aside")
    with Faults(0, under=place) as counted:
        merged(source, place, "new")
    assert {"mkdir", "open", "write", "sendfile", "fsync", "close"} <= set(counted.names)
    for number in range(1, len(counted.names) + 1, step):
        shutil.rmtree(place / "out")
        if not first:
            merged(source, place, "old")
            assert os.listdir(place) == ["out"], "no orphan is left after the next run"
        error = errno.ENOSPC if number % 2 else errno.EIO
        with Faults(number, under=place, error=error) as faults:
            try:
                merged(source, place, "new")
                expected: str | None = "new"
            except SidepathError:
                expected = None if first else "old"
        assert faults.hit
        assert state(place) == expected, (number, faults.names[-1])
        assert expected == "new" or os.listdir(place) == ([] if first else ["out"])
        if not (place / "out").exists():
            (place / "out").mkdir()


def test_a_full_disk_leaves_the_old_folder(place: Path, source: Path) -> None:
    """The kernel's own refusals, in the middle of a file."""
    sizes = {path.stat().st_size for path in (place / "out").glob("*.safetensors")}
    for size in sorted({0, 1, 100, *(size - 1 for size in sizes)}):
        with full_disk(size), pytest.raises(SidepathError):
            merged(source, place, "new")
        assert state(place) == "old"
        assert os.listdir(place) == ["out"]


@pytest.mark.slow
def test_each_file_operation_is_the_last_one(place: Path, source: Path) -> None:
    names = operations(source, place)
    seen = set()
    for number in range(1, len(names) + 1):

        def dying(number: int = number) -> None:
            with Faults(number, under=place, kill=True):
                merged(source, place, "new")

        assert forked(dying) == KILLED, number
        seen.add(state(place))
        assert seen <= {"old", "new"}
        merged(source, place, "old")
        assert os.listdir(place) == ["out"], "no orphan is left after the next run"
    assert seen == {"old", "new"}


@pytest.mark.slow
def test_each_file_operation_of_a_merge_with_parity_fails_once(place: Path, source: Path) -> None:
    names = operations(source, place, skip_parity=False)
    for number in range(1, len(names) + 1):
        with Faults(number, under=place, error=errno.EIO):
            try:
                merged(source, place, "new", skip_parity=False)
                expected = "new"
            except SidepathError:
                expected = "old"
        assert state(place) == expected, (number, names[number - 1])
        if expected == "new":
            merged(source, place, "old")


@pytest.mark.slow
def test_killed_at_any_time(place: Path, source: Path) -> None:
    began = time.perf_counter()
    assert forked(lambda: merged(source, place, "new", skip_parity=False)) == 0
    whole = time.perf_counter() - began
    merged(source, place, "old")
    killed = 0
    for number in range(60):
        child = started(lambda: merged(source, place, "new", skip_parity=False))
        time.sleep(whole * number / 50)
        os.kill(child, signal.SIGKILL)
        killed += ended(child) == -signal.SIGKILL
        assert state(place) in ("old", "new")
        merged(source, place, "old")
        assert os.listdir(place) == ["out"], "no orphan is left after the next run"
    assert killed > 20
