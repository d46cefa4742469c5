"""Wrong input from the command line: code 2, one message, no traceback, nothing half-written."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from pathlib import Path

import pytest
import torch

from tests.hub_stand_in import Hub, serving

from .bad_data import DATA
from .bad_folders import FOLDERS
from .bad_settings import SETTINGS
from .conftest import Run
from .place import Case, Place, merge_command

CASES = (DATA, SETTINGS, FOLDERS)


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


def refused(run: Run, place: Place, arguments: list[str]) -> str:
    """What a refused command says: one message, code 2, and the folder is as it was."""
    before = tree(place.here)
    ran = run(*arguments)
    assert ran.code == 2, ran.err
    assert ran.out == ""
    messages = [line for line in ran.err.splitlines() if line.startswith("sidepath")]
    assert len(messages) == 1, ran.err
    assert "Traceback" not in ran.err
    assert "internal fault" not in ran.err
    assert tree(place.here) == before
    return ran.err


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name) for table in CASES for name, case in table.items()],
)
def test_refused(run: Run, place: Place, case: Case) -> None:
    make, fragments = case
    said = refused(run, place, make(place))
    assert [fragment for fragment in fragments if fragment not in said] == [], said


@pytest.mark.slow
def test_a_broken_row_in_the_middle_of_a_million(run: Run, place: Place) -> None:
    rows = ['{"text": "a"}\n'] * 1_000_000
    rows[499_999] = "{broken\n"
    data = place.file("d.jsonl", "".join(rows))
    said = refused(run, place, place.train("--stream", data=data))
    assert "line 500000: not JSON" in said


def test_a_data_set_that_the_hub_does_not_have(
    run: Run, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with serving(Hub({})) as hub:
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.address)
        said = refused(run, place, place.train(data=Path("hub:me/absent")))
    assert "hub:me/absent" in said
    assert "cannot be had from the hub" in said
    assert "404" in said


def test_merged_twice(run: Run, place: Place) -> None:
    merged = place.here / "merged"
    assert run("merge", place.base, place.adapter, merged).code == 0
    again = merge_command(place, merged, place.adapter, place.here / "again")
    assert "merged into the base already" in refused(run, place, again)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(run: Run, place: Place) -> None:
    assert "no GPU" in refused(run, place, place.train("--device", "cuda"))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("verb", ["train", "merge"])
def test_disk_full(run: Run, place: Place, verb: str) -> None:
    merge = merge_command(place, place.base, place.adapter, place.here / "out")
    arguments = place.train() if verb == "train" else merge
    assert "No space left on device" in refused(run, place, arguments)


def test_no_permission_is_found_before_training(
    run: Run, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A superuser may write anywhere, so the refusal is simulated where the system would make it.
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    said = refused(run, place, place.train())
    assert "Permission denied" in said
    assert "step" not in said


@pytest.mark.usefixtures("full_disk")
def test_a_failed_overwrite_leaves_the_old_adapter(run: Run, place: Place) -> None:
    old = tree(place.adapter)
    arguments = place.train("--output", place.adapter, "--overwrite")
    assert "No space left on device" in refused(run, place, arguments)
    assert tree(place.adapter) == old


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
    said = refused(run, place, other)
    assert "learning_rate" in said
    assert "other settings" in said
    assert run(*checkpointed, "--resume").code == 0
    assert not (place.here / "out.checkpoints").exists()


def test_debug_shows_the_traceback(run: Run, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDEPATH_DEBUG", "1")
    ran = run(*place.train("--r", 0))
    assert ran.code == 2
    assert "Traceback" in ran.err
