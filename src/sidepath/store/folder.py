"""Folders that appear on disk whole or not at all (floor 4).

`publish` gives its caller a temporary folder beside the target. What was written there is
fsynced, file by file and folder by folder, and swapped in by one rename: whoever reads the
target sees the old folder or the new one. The temporary folder is locked (flock) while its
writer lives, so the next save can tell a killed save's leftovers from a save in progress.

Beside a target `x` may stand, after a kill only: `.x.sidepath-<8 hex>.new` (a save that was not
finished, or the folder it replaced), `.old` (set aside during a swap) and `.gone` (being deleted).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from sidepath.errors import StoreError, WriteFailed

MANIFESTS = ("sidepath.json", "parity.json", "checkpoint.json")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)
_LEFTOVER = re.compile(r"\.(.+)\.sidepath-[0-9a-f]{8}\.(new|old|gone)")


@contextmanager
def publish(
    folder: str | os.PathLike[str],
    *,
    manifests: Sequence[str] = MANIFESTS,
    replace: Callable[[Path], bool] | None = None,
) -> Iterator[Path]:
    """Give a temporary sibling folder to write into; on success it becomes `folder`.

    An existing folder is replaced when it is empty, when one of its `manifests` lists every
    file in it (`lists_all_files`), or when `replace(folder)` is true; a file, or a folder that
    holds anything else, is refused. Modes follow the umask. Parents are created as needed.

    Errors: `StoreError` for a target that must not be replaced; `WriteFailed` for any OSError
    (disk full, no permission, ...). After an error nothing is left and the old folder stands.
    """
    target = Path(os.path.realpath(folder))
    made: list[Path] = []
    try:
        try:
            _refuse_foreign(target, manifests, replace)
            make_parents(target.parent, made)
            clear_leftovers(target.parent, re.compile(re.escape(target.name)))
            with locked_sibling(target) as temporary:
                yield temporary
                _settle(temporary)
                _swap_in(temporary, target)
        except BaseException:
            for parent in made:
                with suppress(OSError):
                    parent.rmdir()
            raise
    except (OSError, SafetensorError) as error:
        raise write_failed(folder, error) from error


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lists_all_files(folder: Path, manifests: Sequence[str] = MANIFESTS) -> bool:
    """Whether a manifest in `folder` lists, under "files", every other file in it."""
    inside = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()
    }
    for name in manifests:
        # A disk that fails says nothing about whose folder it is.
        with suppress(FileNotFoundError, IsADirectoryError, PermissionError, ValueError):
            manifest = json.loads((folder / name).read_bytes())
            files = manifest.get("files") if isinstance(manifest, dict) else None
            if isinstance(files, dict) and inside <= {name, *files}:
                return True
    return False


def _refuse_foreign(
    target: Path, manifests: Sequence[str], replace: Callable[[Path], bool] | None
) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise StoreError(
            "the output exists and is not a folder", where=target, hint="choose another path"
        )
    empty = next(target.iterdir(), None) is None
    if empty or (replace is not None and replace(target)) or lists_all_files(target, manifests):
        return
    raise StoreError(
        "the output folder holds files that are not ours to replace",
        where=target,
        found=names_in(target),
        expected="no folder, an empty one, or one that an earlier save wrote",
        hint="choose another folder, or move its files away",
    )


def names_in(folder: Path) -> str:
    """What a folder holds, for a message: the first eight names."""
    return ", ".join(sorted(path.name for path in folder.iterdir())[:8])


def make_parents(parent: Path, made: list[Path]) -> None:
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
        yield _lock(handle)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked_sibling(target: Path) -> Iterator[Path]:
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
            with suppress(OSError):  # even told to ignore errors it raises some
                shutil.rmtree(path, ignore_errors=True)
            if handle >= 0:
                with suppress(OSError):  # closing it is all that is left of a finished save
                    os.close(handle)


def _settle(folder: Path) -> None:
    """Give every file and folder the umask's mode and bring it to the disk, deepest first."""
    # A folder made by mkdir shows the umask; reading it with os.umask would change it for a moment.
    folder_mode = stat.S_IMODE(folder.stat().st_mode)
    for here, _, files in os.walk(folder, topdown=False):
        for name in files:
            fsync(os.path.join(here, name), folder_mode & 0o666)
        fsync(here, folder_mode)


def fsync(path: str | Path, mode: int | None = None) -> None:
    """Bring a file or a folder to the disk, given a mode first."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        if mode is not None and stat.S_IMODE(os.fstat(handle).st_mode) != mode:
            os.fchmod(handle, mode)
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap_in(temporary: Path, target: Path) -> None:
    """Put `temporary` in `target`'s place; afterwards `temporary` holds the old folder, if any."""
    if target.exists():
        _swap(temporary, target)
        undo = functools.partial(_swap, temporary, target)
    else:
        os.rename(temporary, target)
        undo = functools.partial(os.rename, target, temporary)
    try:
        fsync(target.parent)
    except BaseException:
        undo()
        raise


def _swap(temporary: Path, target: Path) -> None:
    """Let two folders change places: in one step where the system can, else by three renames."""
    if _exchange(temporary, target):
        return
    aside = temporary.with_suffix(".old")
    handle = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(handle)  # or another process would take what is set aside for a killed save's
        os.rename(target, aside)
        try:
            os.rename(temporary, target)
        except BaseException:
            os.rename(aside, target)
            raise
        try:
            os.rename(aside, temporary)
        except BaseException:
            os.rename(target, temporary)
            os.rename(aside, target)
            raise
    finally:
        with suppress(OSError):
            os.close(handle)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step (Linux renameat2); False where the system cannot."""
    renameat2 = _renameat2()
    if renameat2 is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_char_p) * 2 + (ctypes.c_uint,)
    function.restype = ctypes.c_int
    return function  # type: ignore[no-any-return]


def write_failed(folder: str | os.PathLike[str], error: OSError | SafetensorError) -> WriteFailed:
    """The error for an output that could not be written."""
    reason = getattr(error, "strerror", None) or str(error)
    path = getattr(error, "filename", None)
    return WriteFailed(
        f"cannot write {os.fspath(folder)}: {reason}",
        where=path or os.fspath(folder),
        hint="nothing was written; free space or check the permissions, then save again",
    )
