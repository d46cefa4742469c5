"""Saving a checkpoint or an adapter while each file operation fails, or is the last one."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sidepath.errors import WriteFailed
from sidepath.methods.lora import LoRA
from sidepath.store.adapter import inject, load
from sidepath.training.checkpoint import Checkpoint, latest, save
from tests.faults import KILLED, Faults, forked, full_disk
from tests.training.kit import llama

# Every operation in turn is for `make test-slow`; the quick suite takes every fifth.
EVERY = [pytest.param(1, marks=pytest.mark.slow, id="every"), pytest.param(5, id="every fifth")]
SLOW = [True, pytest.param(False, marks=pytest.mark.slow)]
ENDS = [
    {"error": errno.ENOSPC},
    {"error": errno.EIO},
    {"error": errno.EIO, "lasting": True},
    {"kill": True},
]


def checkpoint(step: int) -> Checkpoint:
    tensors = {
        "model/a": torch.full((300, 2), float(step)),
        "optimizer/exp_avg/a": torch.full((5,), step + 0.5),
    }
    return Checkpoint(step, tensors, {"place": step}, {"config": {"seed": 1}})


def require_whole(found: Checkpoint | None, steps: tuple[int, ...]) -> None:
    assert found is not None
    assert found.step in steps
    expected = checkpoint(found.step)
    assert (found.progress, found.identity) == (expected.progress, expected.identity)
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name], expected.tensors[name]) for name in found.tensors)


def attempt(
    action: Callable[[], object], under: Path, number: int, end: dict[str, Any]
) -> tuple[bool, bool]:
    """Run with a fault at operation `number`: was it reached, was it said?"""
    faults = Faults(number, under=under, **end)

    def with_faults() -> None:
        with faults:
            action()

    if faults.kill:
        code = forked(with_faults)
        assert code in (0, KILLED)
        return code == KILLED, code == KILLED
    try:
        with_faults()
    except WriteFailed as error:
        return faults.hit, error.what.startswith("cannot write ")
    return faults.hit, False


def folders(path: Path) -> list[str]:
    return sorted(os.listdir(path))


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("exchange", SLOW)
@pytest.mark.parametrize("end", ENDS, ids=str)
@pytest.mark.parametrize("first", [pytest.param(True, marks=pytest.mark.slow), False])
def test_each_operation_of_a_checkpoint(
    tmp_path: Path, end: dict[str, Any], exchange: bool, first: bool, every: int
) -> None:
    number, said = 2 - every, 0
    while True:
        number += every
        folder = tmp_path / str(number) / "run"
        if not first:
            save(folder, checkpoint(1), keep=2)
            save(folder, checkpoint(2), keep=2)
        reached, failed = attempt(
            partial(save, folder, checkpoint(3), keep=2),
            folder,
            number,
            {**end, "exchange": exchange},
        )
        said += failed
        # Before `latest` clears anything: the older ones stand until the new one is safe.
        present = [name for name in folders(folder) if name[0] != "."] if folder.exists() else []
        if not first and "step-00000003" not in present:
            assert present == ["step-00000001", "step-00000002"], number
        found, notices = latest(folder)
        assert notices == [], number
        if first and found is None:
            assert failed
        else:
            require_whole(found, (3,) if first else (2, 3))
        if not failed:
            require_whole(found, (3,))
        save(folder, checkpoint(4), keep=2)
        save(folder, checkpoint(5), keep=2)
        assert folders(folder) == ["step-00000004", "step-00000005"], number
        if not reached:
            break
    assert number > 35
    assert said > 20 // every


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("exchange", SLOW)
@pytest.mark.parametrize("end", ENDS, ids=str)
def test_each_operation_of_replacing_a_damaged_checkpoint(
    tmp_path: Path, end: dict[str, Any], exchange: bool, every: int
) -> None:
    number, reached = 2 - every, True
    while reached:
        number += every
        folder = tmp_path / str(number)
        save(folder, checkpoint(1), keep=3)
        path = save(folder, checkpoint(2), keep=3)
        (path / "checkpoint.json").write_bytes(b"")
        reached, failed = attempt(
            partial(save, folder, checkpoint(2), keep=3),
            folder,
            number,
            {**end, "exchange": exchange},
        )
        found, notices = latest(folder)
        require_whole(found, (1, 2) if failed else (2,))
        assert len(notices) == (found is not None and found.step == 1), number
        save(folder, checkpoint(2), keep=3)
        assert folders(folder) == ["step-00000001", "step-00000002"], number
    assert number > 35


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("end", ENDS, ids=str)
def test_each_operation_of_saving_an_adapter(
    tmp_path: Path, end: dict[str, Any], every: int
) -> None:
    model = llama()
    adapter = inject(model, LoRA(r=2, targets=("q_proj",)), name="a")
    number, reached = 2 - every, True
    while reached:
        number += every
        parent = tmp_path / str(number)
        adapter.save(parent / "a", record={"turn": "old"})
        reached, failed = attempt(
            partial(adapter.save, parent / "a", record={"turn": "new"}),
            parent,
            number,
            end,
        )
        other = load(llama(), parent / "a", name="b")  # checks every digest
        assert other.record["turn"] in (("old", "new") if failed else ("new",)), number
        adapter.save(parent / "a", record={"turn": "newest"})
        assert folders(parent) == ["a"], number
    assert number > 50


@pytest.mark.parametrize("size", [0, 1, 1000, 2000])
def test_a_disk_that_is_full_for_rust_too(tmp_path: Path, size: int) -> None:
    save(tmp_path, checkpoint(1), keep=2)
    with full_disk(size), pytest.raises(WriteFailed, match="File too large"):
        save(tmp_path, checkpoint(2), keep=2)
    assert folders(tmp_path) == ["step-00000001"]
    require_whole(latest(tmp_path)[0], (1,))


def test_the_kernels_kill_within_rusts_write(tmp_path: Path) -> None:
    save(tmp_path, checkpoint(1), keep=2)
    assert forked(lambda: save(tmp_path, checkpoint(2), keep=2), limit=1000) < 0
    assert any(path.name.startswith(".tmp") for path in tmp_path.glob("*/*")), "it was not hit"
    require_whole(latest(tmp_path)[0], (1,))
    assert folders(tmp_path) == ["step-00000001"]
