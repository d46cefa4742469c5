"""Folders appear whole or not at all: every file operation fails, or is the last one, in turn."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sidepath.errors import StoreError, WriteFailed
from sidepath.store import aside
from sidepath.store import folder as folders
from sidepath.store.folder import lists_all_files, publish, sha256_file

OPERATIONS = ("mkdir", "open", "rename", "fsync", "fchmod", "close")


def write(target: Path, text: str) -> None:
    with publish(target) as temporary:
        (temporary / "weights").write_text(text)
        (temporary / "inner").mkdir()
        (temporary / "inner" / "more").write_text(text)
        files = {"weights": 1, "inner/more": 1}
        (temporary / "sidepath.json").write_text(json.dumps({"files": files, "text": text}))


def state(target: Path) -> str | None:
    """The text all files agree on; None when there is no folder. Anything else fails."""
    if not target.exists():
        return None
    texts: set[str] = {
        (target / "weights").read_text(),
        (target / "inner" / "more").read_text(),
        json.loads((target / "sidepath.json").read_text())["text"],
    }
    assert len(texts) == 1, "a mixture of two saves"
    return texts.pop()


def test_writes_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "adapter"
    write(target, "old")
    write(target, "new")
    assert state(target) == "new"
    assert os.listdir(target.parent) == ["adapter"]


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with publish(tmp_path / "a") as temporary:
            handle = os.open(temporary / "private", os.O_CREAT | os.O_WRONLY, 0o600)
            os.close(handle)
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "a" / "private").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("manifest", [None, {"files": {}}, {"files": 3}, [1], "sidepath.json"])
def test_a_folder_of_other_things_is_not_replaced(tmp_path: Path, manifest: Any) -> None:
    target = tmp_path / "precious"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    if manifest is not None:
        (target / "sidepath.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=r"not ours to replace[\s\S]*thesis.txt"):
        write(target, "new")
    assert (target / "thesis.txt").read_text() == "years of work"


def test_a_manifest_of_another_kind_does_not_count(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    assert lists_all_files(tmp_path / "a")
    with pytest.raises(StoreError), publish(tmp_path / "a", manifests=("parity.json",)):
        pass
    assert state(tmp_path / "a") == "old"


def test_the_caller_may_say_what_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("x")
    with publish(tmp_path / "a", replace=lambda path: (path / "x").exists()) as temporary:
        (temporary / "y").write_text("y")
    assert os.listdir(tmp_path / "a") == ["y"]


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("text")
    with pytest.raises(StoreError, match="not a folder"):
        write(tmp_path / "a", "new")


def test_an_error_of_the_writer_leaves_nothing(tmp_path: Path) -> None:
    def breaks() -> None:
        with publish(tmp_path / "new" / "a") as temporary:
            (temporary / "half").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        breaks()
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_said_so(tmp_path: Path) -> None:
    with (
        pytest.raises(WriteFailed, match="No space left on device") as caught,
        publish(tmp_path / "a"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere/weights")
    assert caught.value.where == "somewhere/weights"
    assert os.listdir(tmp_path) == []


def test_a_parent_that_is_a_file_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteFailed, match="File exists"):
        write(tmp_path / "file" / "a", "new")


def test_no_permission_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, mode: int = 0o777) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(WriteFailed, match="Permission denied"):
        write(tmp_path / "a", "new")


def test_a_link_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert state(tmp_path / "real") == "new"


def test_leftovers_are_cleared_but_not_a_save_in_progress(tmp_path: Path) -> None:
    dead, alive = tmp_path / ".a.sidepath-00000000.new", tmp_path / ".a.sidepath-00000001.new"
    other = tmp_path / ".b.sidepath-00000000.new"
    for path in (dead, alive, other):
        path.mkdir()
        (path / "half").write_text("half")
    handle = os.open(alive, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        write(tmp_path / "a", "new")
        assert sorted(os.listdir(tmp_path)) == [alive.name, other.name, "a"]
    finally:
        os.close(handle)
    write(tmp_path / "a", "newer")
    assert sorted(os.listdir(tmp_path)) == [other.name, "a"]


def test_an_old_folder_set_aside_by_a_killed_save_comes_back(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    os.rename(tmp_path / "a", tmp_path / ".a.sidepath-00000000.old")
    with pytest.raises(ZeroDivisionError), publish(tmp_path / "a"):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["a"]
    assert state(tmp_path / "a") == "old"


class Failing:
    """os functions of `folder.py`, the n-th call of which fails."""

    def __init__(self, number: int) -> None:
        self.left = number
        self.failed = False

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                self.failed = True
                raise OSError(errno.EIO, "injected failure")
            return function(*args, **kwargs)

        return wrapped


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("existing", [True, False])
def test_each_operation_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, existing: bool
) -> None:
    number, seen = 0, set()
    while True:
        number += 1
        parent = tmp_path / str(number)
        parent.mkdir()
        if existing:
            write(parent / "a", "old")
        failing = Failing(number)
        with monkeypatch.context() as patch:
            for name in OPERATIONS:
                patch.setattr(os, name, failing.wrap(getattr(os, name)))
            if exchange:
                patch.setattr(folders, "_exchange", failing.wrap(folders._exchange))
            else:
                patch.setattr(folders, "_renameat2", lambda: None)
            try:
                write(parent / "a", "new")
            except WriteFailed:
                assert failing.failed
                seen.add(state(parent / "a"))
            else:
                assert state(parent / "a") == "new"
        if not failing.failed:
            break
        assert state(parent / "a") in ({"old", "new"} if existing else {None, "new"})
        write(parent / "a", "newest")
        assert state(parent / "a") == "newest"
        assert os.listdir(parent) == ["a"], f"an orphan after operation {number} failed"
    assert number > 12, "the operations were not reached"
    assert seen == ({"old"} if existing else {None}), "an error was raised for a finished save"


KILLED = textwrap.dedent(
    """
    import json, os, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[3])
    import test_folder as t
    root, exchange = Path(sys.argv[1]), sys.argv[2] == "True"
    number = done = 0
    while not done:
        number += 1
        target = root / str(number) / "a"
        t.write(target, "old")
        child = os.fork()
        if child == 0:
            left = [number]
            def kills(function):
                def wrapped(*args, **kwargs):
                    left[0] -= 1
                    if left[0] == 0:
                        os._exit(9)
                    return function(*args, **kwargs)
                return wrapped
            for name in (*t.OPERATIONS, "rmdir", "unlink"):
                setattr(os, name, kills(getattr(os, name)))
            t.folders._exchange = kills(t.folders._exchange)
            if not exchange:
                t.folders._renameat2 = lambda: None
            t.write(target, "new")
            os._exit(0)
        done = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        leftover = [name for name in os.listdir(target.parent) if name != "a"]
        if not target.exists():
            assert any(name.endswith(".old") for name in leftover), leftover
            assert not exchange
        else:
            assert t.state(target) in ("old", "new")
        t.write(target, "newest")
        assert t.state(target) == "newest"
        assert os.listdir(target.parent) == ["a"], os.listdir(target.parent)
    print(number)
    """
)


@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_at_each_operation(tmp_path: Path, exchange: bool) -> None:
    command = [
        sys.executable,
        "-c",
        KILLED,
        str(tmp_path),
        str(exchange),
        str(Path(__file__).parent),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 12


def test_sha256_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "x") == expected


def test_a_leftover_is_held_while_it_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a save that made its folder in between would lose it under its hands."""
    (tmp_path / ".a.sidepath-00000000.new").mkdir()
    held = []

    def watched(path: Path, **_: Any) -> None:
        handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.append(path.name)
        finally:
            os.close(handle)

    monkeypatch.setattr(shutil, "rmtree", watched)
    aside.clear_leftovers(tmp_path, re.compile("a"))
    assert held == [".a.sidepath-00000000.new"]


def test_what_a_living_swap_has_set_aside_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without renameat2 the target is missing for a moment: nobody may give it back then."""
    write(tmp_path / "a", "old")
    monkeypatch.setattr(folders, "_renameat2", lambda: None)
    rename, seen = os.rename, []

    def watched(source: Any, target: Any) -> None:
        rename(source, target)
        if str(target).endswith(".old"):
            aside.clear_leftovers(tmp_path, re.compile("a"))
            seen.append(Path(target).exists())

    monkeypatch.setattr(os, "rename", watched)
    write(tmp_path / "a", "new")
    assert seen == [True]
    assert state(tmp_path / "a") == "new"
    assert os.listdir(tmp_path) == ["a"]


def test_leftovers_are_cleared_by_the_names_of_their_targets(tmp_path: Path) -> None:
    names = [
        ".b-1.sidepath-00000000.new",
        ".b-2.sidepath-00000000.gone",
        ".b-3.sidepath-0000000a.old",
    ]
    others = [".c.sidepath-00000000.new", ".b-1.sidepath-short.new", "b-9"]
    for name in (*names, *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text(name)
    aside.clear_leftovers(tmp_path, re.compile(r"b-\d"))
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "b-3"])
    assert (tmp_path / "b-3" / "half").read_text() == names[2]


def test_discarding_never_shows_half_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a", "old")

    def broken(path: Path, **_: Any) -> None:
        assert not (tmp_path / "a").exists()
        (path / "weights").unlink()
        raise OSError(errno.EIO, "injected")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", broken)
        aside.discard(tmp_path / "a")
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".a.sidepath-")
    write(tmp_path / "a", "new")
    assert os.listdir(tmp_path) == ["a"]


def test_new_parents_are_brought_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    fsync = os.fsync

    def watched(handle: int) -> None:
        synced.append(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    write(tmp_path / "one" / "two" / "a", "new")
    for path in (tmp_path, tmp_path / "one", tmp_path / "one" / "two"):
        assert path.stat().st_ino in synced, path


def test_parents_are_removed_again_when_one_cannot_be_brought_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(handle: int) -> None:
        raise OSError(errno.EIO, "injected")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(WriteFailed):
        write(tmp_path / "one" / "two" / "a", "new")
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fails_is_not_taken_for_foreign_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a", "old")

    def broken(path: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(folders, "read_json", broken)
        with pytest.raises(WriteFailed, match="Input/output error"):
            write(tmp_path / "a", "new")
    assert state(tmp_path / "a") == "old"


def test_a_leftover_that_another_process_clears_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between being opened and being locked: it is nobody's to clear any more."""
    left = tmp_path / ".x.sidepath-0123abcd.new"
    left.mkdir()
    locked = aside.lock

    def cleared(handle: int) -> bool:
        if left.exists():
            left.rmdir()
        return locked(handle)

    monkeypatch.setattr(aside, "lock", cleared)
    write(tmp_path / "x", "new")
    assert state(tmp_path / "x") == "new"
