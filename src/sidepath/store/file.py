"""One file that appears on disk whole or not at all (floor 4)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sidepath.errors import StoreError
from sidepath.store.aside import beside, fsync


@contextmanager
def publish_file(
    path: str | os.PathLike[str], *, overwrite: bool = False, mode: int = 0o666
) -> Iterator[Path]:
    """Give a place to write a file to; on success it becomes `path`. See `folder.publish`. Of
    `mode` it has what the umask leaves.

    Errors: `StoreError` for a folder, and for a file that is there without `overwrite`;
    `WriteFailed` for any OSError. After an error nothing is left and the old file stands.
    """
    with beside(path, lambda target: refuse_existing(target, overwrite)) as (target, temporary):
        left = temporary.stat().st_mode & mode  # what the umask leaves
        file = temporary / target.name
        yield file
        fsync(file, left)
        _swap_in(file, target)


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Raise `StoreError` where a file must not be written."""
    if target.is_dir():
        raise StoreError("the output is a folder, expected a file", where=target)
    if target.exists() and not overwrite:
        raise StoreError(
            "the output file is there already",
            where=target,
            hint="choose another name, or give --overwrite to replace it",
        )


def _swap_in(file: Path, target: Path) -> None:
    """Put `file` in `target`'s place; the old file stands again where that cannot be made sure."""
    before = file.with_name(f"{file.name}.before")
    if target.exists():
        os.link(target, before)
    os.replace(file, target)
    try:
        fsync(target.parent)
    except BaseException:
        if before.exists():
            os.replace(before, target)
        else:
            os.unlink(target)
        raise
