"""Digests of large files, taken by other cores while the next file is written (floor 5)."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from sidepath.store.aside import fsync
from sidepath.store.folder import sha256_file


class Digests:
    """The SHA-256 of files; those that were announced are read, and brought to the disk, meanwhile.

    Within the block. Errors come out of `of`: `OSError`.
    """

    def __init__(self) -> None:
        self._workers = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
        self._found: dict[Path, Future[str]] = {}

    def __enter__(self) -> Digests:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._workers.shutdown(cancel_futures=True)

    def take(self, path: Path) -> None:
        """Announce a file that is whole."""
        self._found[path] = self._workers.submit(_settled, path)

    def of(self, path: Path) -> str:
        """The digest of a file, in hexadecimal."""
        return self._found[path].result() if path in self._found else sha256_file(path)


def _settled(path: Path) -> str:
    fsync(path)
    return sha256_file(path)
