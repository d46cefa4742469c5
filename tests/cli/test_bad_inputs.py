"""Wrong input from the command line: code 2, one message, no traceback, nothing half-written."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from pathlib import Path

import pytest
import torch

from tests.data.hub_stand_in import Hub, serving

from .bad_cases import CASES, Place, merge_command, million_rows_with_a_broken_one
from .conftest import Ran, Run


@pytest.fixture
def place(
    tmp_path: Path, tiny_base: Path, other_base: Path, pairs: Path, labelled: Path, adapter: Path
) -> Place:
    return Place(tmp_path, tiny_base, other_base, pairs, labelled, adapter)


def tree(folder: Path) -> dict[str, str]:
    """Every path below a folder with its contents' digest."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def refused(run: Run, place: Place, arguments: list[str], *fragments: str) -> Ran:
    before = tree(place.here)
    ran = run(*arguments)
    assert ran.code == 2, ran.err
    assert ran.out == ""
    messages = [line for line in ran.err.splitlines() if line.startswith("sidepath")]
    assert len(messages) == 1, ran.err
    assert "Traceback" not in ran.err
    assert "internal fault" not in ran.err
    for fragment in fragments:
        assert fragment in ran.err, ran.err
    assert tree(place.here) == before
    return ran


@pytest.mark.parametrize("name", CASES)
def test_refused(run: Run, place: Place, name: str) -> None:
    make, fragments = CASES[name]
    refused(run, place, make(place), *fragments)


@pytest.mark.slow
def test_a_broken_row_in_the_middle_of_a_million(run: Run, place: Place) -> None:
    refused(run, place, million_rows_with_a_broken_one(place), "line 500000: not JSON")


def test_a_data_set_that_the_hub_does_not_have(
    run: Run, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with serving(Hub({}, main="none")) as hub:
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.address)
        absent = place.train(data=Path("hub:me/absent"))
        refused(run, place, absent, "hub:me/absent", "cannot be had from the hub", "404")


def test_merged_twice(run: Run, place: Place) -> None:
    merged = place.here / "merged"
    assert run("merge", place.base, place.adapter, merged).code == 0
    again = merge_command(place, merged, place.adapter, place.here / "again")
    refused(run, place, again, "merged into the base already")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(run: Run, place: Place) -> None:
    refused(run, place, place.train("--device", "cuda"), "no GPU")


@pytest.mark.parametrize("verb", ["train", "merge"])
def test_disk_full(run: Run, place: Place, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    merge = merge_command(place, place.base, place.adapter, place.here / "out")
    arguments = place.train() if verb == "train" else merge
    refused(run, place, arguments, "No space left on device")


def test_no_permission_is_found_before_training(
    run: Run, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A superuser may write anywhere, so the refusal is simulated where the system would make it.
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    ran = refused(run, place, place.train(), "Permission denied")
    assert "step" not in ran.err


def test_a_failed_overwrite_leaves_the_old_adapter(
    run: Run, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    arguments = place.train("--output", place.adapter, "--overwrite")
    refused(run, place, arguments, "No space left on device")


def test_resume_with_other_settings(
    run: Run, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    checkpointed = place.train("--steps", 2, "--checkpoint-every", 1)
    with monkeypatch.context() as patch:
        patch.setattr("sidepath.store.adapter.Adapter.save", killed)
        assert run(*checkpointed).code == 130
    other = [*checkpointed, "--resume", "--learning-rate", "0.2"]
    refused(run, place, other, "learning_rate", "other settings")
    assert run(*checkpointed, "--resume").code == 0
    assert not (place.here / "out.checkpoints").exists()


def test_debug_shows_the_traceback(run: Run, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDEPATH_DEBUG", "1")
    ran = run(*place.train("--r", 0))
    assert ran.code == 2
    assert "Traceback" in ran.err
