"""Folders that commands write: everything that would fail at the end is found first (floor 7)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from sidepath.errors import StoreError, WriteFailed
from sidepath.store.folder import names_in
from sidepath.store.hub import refuse_hub


def require_output(output: Path, *, overwrite: bool, ours: Callable[[Path], bool]) -> None:
    """Raise unless a folder can be published as `output`; nothing is left on disk.

    `ours` tells whether a folder that is there may be replaced: what will publish asks the same.

    Errors: `StoreError` for a file, for a folder of someone else's, and for one of ours without
    `overwrite`; `WriteFailed` when nothing can be written there.
    """
    _refuse_file(output)
    if output.is_dir() and any(output.iterdir()):
        _require_ours(output, overwrite, ours)
    _require_writable(next(path for path in output.absolute().parents if path.exists()), output)


def require_place(output: Path) -> None:
    """Raise unless files can be put into the folder `output`, which may be there already.

    Errors: `StoreError` for a file; `WriteFailed` when nothing can be written there.
    """
    _refuse_file(output)
    place = output.absolute()
    _require_writable(next(path for path in (place, *place.parents) if path.exists()), output)


def _refuse_file(output: Path) -> None:
    refuse_hub(output)
    if output.exists() and not output.is_dir():
        raise StoreError(
            "the output exists and is not a folder", where=output, hint="choose another path"
        )


def _require_writable(above: Path, output: Path) -> None:
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".sidepath-", dir=above))
    except OSError as error:
        raise WriteFailed(
            f"the output cannot be written: {error.strerror}",
            where=output,
            found=f"{above} takes no new folder",
            hint="choose another folder, or check its permissions and free space",
        ) from error


def _require_ours(output: Path, overwrite: bool, ours: Callable[[Path], bool]) -> None:
    if not ours(output):
        raise StoreError(
            "the output folder holds files that no earlier command of this kind wrote",
            where=output,
            found=names_in(output),
            hint="choose another folder",
        )
    if not overwrite:
        raise StoreError(
            "the output folder holds an earlier result",
            where=output,
            hint="choose another folder, or give --overwrite to replace it",
        )
