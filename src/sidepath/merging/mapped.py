"""Tensors whose memory is a file's: where their bytes lie, and how its pages are let go (floor 5).

transformers loads safetensors by mapping the files into memory; a tensor that it did not have to
convert stays a window onto its file. The kernel's own table of mappings says which those are, so
no name has to be trusted: the bytes of such a tensor are the file's.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

_MAPS = "/proc/self/maps"


class Place(NamedTuple):
    """Where a tensor's bytes begin in a file."""

    path: Path
    start: int

    def follows(self, other: Place, size: int) -> bool:
        """Whether these bytes come right behind the `size` bytes at `other`."""
        return self.path == other.path and self.start == other.start + size


class _Window(NamedTuple):
    """A stretch of this process's addresses, and the part of a file that is seen there."""

    start: int
    stop: int
    path: Path
    offset: int


class Mapped:
    """The files of a checkpoint as they are mapped into this process now.

    Where the system keeps no such table nothing is found, and every tensor counts as in memory.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        named = {os.path.realpath(path): path for path in files}
        self._windows = sorted(_windows(named))
        self._starts = [window.start for window in self._windows]

    def place(self, tensor: Tensor) -> Place | None:
        """Where a tensor's numbers lie in a file, row-major; None where its memory is no file's."""
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
            return None
        address = tensor.data_ptr()
        at = bisect_right(self._starts, address) - 1
        if at < 0 or address + tensor.nbytes > self._windows[at].stop:
            return None
        window = self._windows[at]
        return Place(window.path, address - window.start + window.offset)

    def release(self, tensor: Tensor) -> None:
        """Let the kernel take back the pages of a mapped tensor; read again, they come again."""
        if self.place(tensor) is None:
            return
        page = mmap.PAGESIZE
        first = -(-tensor.data_ptr() // page) * page
        size = (tensor.data_ptr() + tensor.nbytes) // page * page - first
        if size > 0:
            _madvise()(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def _windows(named: dict[str, Path]) -> Iterable[_Window]:
    try:
        lines = Path(_MAPS).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        # start-stop, permissions, offset, device, inode, path
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] in named:
            start, stop = (int(number, 16) for number in fields[0].split("-"))
            yield _Window(start, stop, named[fields[5]], int(fields[2], 16))


@functools.cache
def _madvise() -> Callable[..., int]:
    function: Callable[..., int] = ctypes.CDLL(None, use_errno=True).madvise
    return function
