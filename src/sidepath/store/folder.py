"""Folders that appear on disk whole or not at all (floor 4).

`publish` gives its caller a temporary folder beside the target (`aside.py`). What was written there
is fsynced, file by file and folder by folder, and swapped in by one rename: whoever reads the
target sees the old folder or the new one.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from sidepath.errors import StoreError
from sidepath.store.aside import beside, fsync, lock
from sidepath.store.hub import refuse_hub
from sidepath.store.tensors import read_json

MANIFESTS = ("sidepath.json", "parity.json", "checkpoint.json")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


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
    refuse_hub(folder)
    with beside(folder, lambda target: _refuse_foreign(target, manifests, replace)) as (
        target,
        temporary,
    ):
        yield temporary
        _settle(temporary)
        _swap_in(temporary, target)


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
            manifest = read_json(folder / name)
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


def refuse_within(read: Iterable[Path], output: Path) -> None:
    """Raise `StoreError` where an output is one of the folders that are read, or lies in one."""
    target = Path(os.path.realpath(output))
    if {Path(os.path.realpath(folder)) for folder in read} & {target, *target.parents}:
        raise StoreError(
            "the output is one of the folders that are read, or lies in one",
            where=output,
            hint="choose another",
        )


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turn any `OSError` of reading a folder into a `StoreError`."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot read {folder}: {error.strerror}", where=folder) from error


def names_in(folder: Path) -> str:
    """What a folder holds, for a message: the first eight names."""
    return ", ".join(sorted(path.name for path in folder.iterdir())[:8])


def _settle(folder: Path) -> None:
    """Give every file and folder the umask's mode and bring it to the disk, deepest first."""
    # A folder made by mkdir shows the umask; reading it with os.umask would change it for a moment.
    folder_mode = stat.S_IMODE(folder.stat().st_mode)
    for here, _, files in os.walk(folder, topdown=False):
        for name in files:
            fsync(os.path.join(here, name), folder_mode & 0o666)
        fsync(here, folder_mode)


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
        lock(handle)  # or another process would take what is set aside for a killed save's
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
