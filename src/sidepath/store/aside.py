"""What stands beside a target while it is written, and what killed writers leave there (floor 4).

A temporary folder beside the target is locked (flock) while its writer lives, so the next one can
tell a killed writer's leftovers from a write in progress. Beside a target `x` may stand, after a
kill only: `.x.sidepath-<8 hex>.new` (a write that was not finished, or what it replaced), `.old`
(set aside during a swap) and `.gone` (being deleted).
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from sidepath.errors import WriteFailed

_LEFTOVER = re.compile(r"\.(.+)\.sidepath-[0-9a-f]{8}\.(new|old|gone)")


@contextmanager
def beside(
    place: str | os.PathLike[str], refuse: Callable[[Path], None]
) -> Iterator[tuple[Path, Path]]:
    """The target of a write, links resolved, and a locked temporary folder beside it.

    `refuse` is asked about the target before anything is made, and may raise. Parents are created
    as needed, and are gone again after an error.
    Errors: `WriteFailed` for any OSError (disk full, no permission, ...).
    """
    target = Path(os.path.realpath(place))
    made: list[Path] = []
    try:
        try:
            refuse(target)
            _make_parents(target.parent, made)
            clear_leftovers(target.parent, re.compile(re.escape(target.name)))
            with _locked_sibling(target) as temporary:
                yield target, temporary
        except BaseException:
            for parent in made:
                with suppress(OSError):
                    parent.rmdir()
            raise
    except (OSError, SafetensorError) as error:
        raise _write_failed(place, error) from error


def _make_parents(parent: Path, made: list[Path]) -> None:
    """Create `parent`, durably; the folders that were made are put into `made`, deepest first."""
    for path in reversed([path for path in (parent, *parent.parents) if not path.exists()]):
        path.mkdir(exist_ok=True)
        made.insert(0, path)
        fsync(path.parent)  # a folder is on the disk once its parent's entry is
    parent.mkdir(exist_ok=True)  # an error if it is a file


def clear_leftovers(parent: Path, names: re.Pattern[str]) -> None:
    """Clear what killed saves left in `parent` of targets whose whole name matches `names`.

    An old folder that was set aside, with nothing in its place, is given back; the rest is
    deleted. Saves in progress are left alone. Errors: `OSError`.
    """
    for path in sorted(parent.iterdir()):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or names.fullmatch(match[1]) is None:
            continue
        with _abandoned(path) as free:
            target = path.with_name(match[1])
            if free and match[2] == "old" and not target.exists():
                os.rename(path, target)
            elif free:
                shutil.rmtree(path)


def discard(folder: Path) -> None:
    """Delete a folder: renamed aside first, so that no reader ever sees half of it.

    Whatever fails is left for `clear_leftovers`; nothing is raised.
    """
    aside = folder.with_name(f".{folder.name}.sidepath-{secrets.token_hex(4)}.gone")
    with suppress(OSError):
        os.rename(folder, aside)
        shutil.rmtree(aside)


@contextmanager
def _abandoned(path: Path) -> Iterator[bool]:
    """Whether no living process writes to a temporary folder; none can start to in the block."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        # Another process may have cleared it between our opening it and locking it.
        yield lock(handle) and path.exists()
    finally:
        os.close(handle)


def lock(handle: int) -> bool:
    """Lock an open folder, unless somebody else has; whether it is ours now."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _locked_sibling(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, locked while it is used and removed afterwards."""
    while True:
        path = target.with_name(f".{target.name}.sidepath-{secrets.token_hex(4)}.new")
        os.mkdir(path)
        handle = -1
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(handle, fcntl.LOCK_EX)
            if not path.exists():  # another save took it for a leftover before it was locked
                continue
            yield path
            return
        finally:
            with suppress(OSError):  # rmtree ignores all errors but those of its own `close`
                shutil.rmtree(path, ignore_errors=True)
            if handle >= 0:
                with suppress(OSError):  # closing it is all that is left of a finished save
                    os.close(handle)


def fsync(path: str | Path, mode: int | None = None) -> None:
    """Bring a file or a folder to the disk, given a mode first."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        if mode is not None and stat.S_IMODE(os.fstat(handle).st_mode) != mode:
            os.fchmod(handle, mode)
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_failed(folder: str | os.PathLike[str], error: OSError | SafetensorError) -> WriteFailed:
    """The error for an output that could not be written."""
    reason = getattr(error, "strerror", None) or str(error)
    path = getattr(error, "filename", None)
    return WriteFailed(
        f"cannot write {os.fspath(folder)}: {reason}",
        where=path or os.fspath(folder),
        hint="nothing was written; free space or check the permissions, then save again",
    )
