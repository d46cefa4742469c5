"""Which folders may be loaded while the server runs (floor 5).

Checked by what the files say of themselves, before memory is allocated for any of them; what `load`
checks besides (digests, shapes, finite values, the base's fingerprint) is not repeated here.
Whoever can write under the root while a folder is being loaded can put another one in its place
after the check: the root's writers are trusted, those who call the route are not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sidepath.errors import RequestRefused
from sidepath.store.contents import refuse_other_folders
from sidepath.store.peft_format import FACTORS_A, WEIGHTS
from sidepath.store.tensors import file_inside, read_header

MOST_FILES = 100
"""Files and folders in an adapter's folder."""


@dataclass(frozen=True)
class Loading:
    """What may be loaded at run time: folders under one root, within limits."""

    root: Path
    max_rank: int = 256
    max_bytes: int = 2**30
    """Bytes of all files of a folder."""

    def folder(self, given: str) -> Path:
        """The folder that a caller means, checked: a path below the root, or from it on.

        Errors: `RequestRefused` with every reason; `StoreError` for folders that hold no adapter or
        a damaged one, pickles by name.
        """
        try:
            folder = self._below(given)
            refuse_other_folders(folder)
            faults = list(self._files(folder)) or list(self._ranks(folder))
        except (OSError, ValueError) as error:  # a name that no file can have, say
            raise _outside(given) from error
        if faults:
            raise RequestRefused(f'"{given}" may not be loaded', faults=faults)
        return folder

    def _below(self, given: str) -> Path:
        root = Path(os.path.realpath(self.root))
        said = Path(given)
        if "\0" in given or not given or ".." in said.parts:
            raise _outside(given)
        parts = said.parts
        if said.is_absolute():
            tops = [top for top in (root, self.root.absolute()) if said.is_relative_to(top)]
            if not tops:
                raise _outside(given)
            parts = said.relative_to(tops[0]).parts
        place = root.joinpath(*parts)
        if place == root or Path(os.path.realpath(place)) != place:
            raise _outside(given)
        return place

    def _files(self, folder: Path) -> Iterator[str]:
        """Faults of the files' number, kinds and sizes."""
        count = size = 0
        for here, folders, files in os.walk(folder):
            for name in (*folders, *files):
                path = Path(here, name)
                count += 1
                if count > MOST_FILES:
                    yield f"more than {MOST_FILES} files"
                    return
                if path.is_symlink():
                    yield f"{path.relative_to(folder)} is a link"
                elif path.is_file():
                    size += path.stat().st_size
                elif not path.is_dir():
                    yield f"{path.relative_to(folder)} is neither a file nor a folder"
        if size > self.max_bytes:
            yield f"{size:,} bytes, at most {self.max_bytes:,}"

    def _ranks(self, folder: Path) -> Iterator[str]:
        """Faults of the ranks that the tensors have."""
        header = read_header(file_inside(folder, WEIGHTS))
        for key, info in header.items():
            if key.endswith(FACTORS_A) and info.shape and info.shape[0] > self.max_rank:
                yield f"{key}: rank {info.shape[0]}, at most {self.max_rank}"


def _outside(given: str) -> RequestRefused:
    return RequestRefused(
        "the path does not lead to a folder under the root that adapters may be loaded from",
        found=given[:200],
        expected="the folder's path from that root on, without links and without ..",
    )
