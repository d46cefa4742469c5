"""File operations that fail, or are the last thing a process does, one after the other.

`Faults` counts the file operations of the code inside its block, and lets the n-th fail with an
`OSError`, or end the process at once (`os._exit`: no `finally`, no `atexit`, no flush runs).

Intercepted are Python's own calls: the functions of `os` in `OPERATIONS` (so `pathlib` and
`shutil.rmtree` too), `fcntl.flock`, `open`, and `write` and `close` of files opened for writing. A
`write` that fails has put the first half of its bytes on the disk, as a full disk does; a `close`
that fails has lost what was still buffered.

Not Python's calls: `renameat2` through ctypes is counted by wrapping `folder._exchange` as a
whole. safetensors writes in Rust: a temporary file `.tmpXXXXXX` beside the target, which it
removes when it fails and renames when it is whole. That is counted as two operations, before and
after: an error before leaves nothing, an error after removes the file; a kill "before" leaves
half of the temporary file, a kill "after" the finished file. Rust's single system calls are not
failed one by one; `full_disk`, and `forked` with a limit, make the real ones fail or be the last
(`RLIMIT_FSIZE`, which the kernel keeps to; it strikes when the file would grow, once a file).
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import fcntl
import io
import os
import resource
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
from safetensors import SafetensorError

from sidepath.store import folder as folders

OPERATIONS = (
    *("open", "close", "write", "sendfile", "fsync", "fchmod", "ftruncate", "link"),
    *("mkdir", "rmdir", "rename", "replace", "unlink", "remove"),
    *("listdir", "scandir", "stat", "lstat", "fstat"),
)
KILLED = 9
"""Exit code of a process that `Faults(..., kill=True)` ended."""
LIFE = 120
"""Seconds after which the kernel ends a forked child (SIGALRM): a wait for one cannot hang."""
_exit, _readlink = os._exit, os.readlink


def flip_bit(path: Path, at: int = -1) -> None:
    """Change the lowest bit of a file's byte `at`; the last one when not given."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


class Faults:
    """Within the block the `number`-th file operation fails; 0: none, they are only counted.

    `error` is the errno. With `lasting`, every operation after it fails too: the disk is gone.
    With `kill` the process ends there. `exchange=False` stands for a system without renameat2.
    Only operations on `under`, and on what lies below it, count.
    """

    def __init__(
        self,
        number: int,
        *,
        under: Path,
        error: int = errno.EIO,
        lasting: bool = False,
        kill: bool = False,
        exchange: bool = True,
    ) -> None:
        self.number, self.error, self.lasting, self.kill = number, error, lasting, kill
        self.exchange = exchange
        self.under = os.path.realpath(under)
        self.names: list[str] = []
        """The operations so far, in order."""
        self._patches = contextlib.ExitStack()

    @property
    def hit(self) -> bool:
        """Whether an operation failed."""
        return 0 < self.number <= len(self.names)

    def concerns(self, place: object) -> bool:
        """Whether a path or an open file is `under` or below it."""
        if isinstance(place, int):
            try:
                place = _readlink(f"/proc/self/fd/{place}")
            except OSError:
                return False
        elif not isinstance(place, str | os.PathLike):
            return False
        path = os.path.abspath(place)
        return path == self.under or path.startswith(self.under + os.sep)

    def strikes(self, name: str) -> bool:
        """Count one operation; whether it has to fail."""
        self.names.append(name)
        at = len(self.names)
        return at == self.number or (self.lasting and self.hit)

    def fail(self, name: str, path: object = None) -> None:
        """End the process, or raise."""
        if self.kill:
            _exit(KILLED)
        where = os.fspath(path) if isinstance(path, str | os.PathLike) else None
        raise OSError(self.error, os.strerror(self.error), where or f"({name})")

    def __enter__(self) -> Faults:
        places: list[tuple[Any, str]] = [(os, name) for name in OPERATIONS]
        places += [(fcntl, "flock"), (folders, "_exchange")]
        for module, name in places:
            self._patch(module, name, self._wrapped(name, getattr(module, name)))
        opened = self._opening(builtins.open)
        self._patch(builtins, "open", opened)
        self._patch(io, "open", opened)
        self._patch(safetensors.torch, "serialize_file", self._rust(safetensors.torch))
        if not self.exchange:
            self._patch(folders, "_renameat2", lambda: None)
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def _patch(self, module: Any, name: str, function: Callable[..., Any]) -> None:
        self._patches.enter_context(mock.patch.object(module, name, function))

    def _wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            directory = kwargs.get("dir_fd")
            if not self.concerns(args[0] if directory is None else directory):
                return function(*args, **kwargs)
            if self.strikes(name):
                if name == "close" and not self.kill:
                    function(*args)  # the kernel closes the file also when it reports an error
                self.fail(name, args[0])
            return function(*args, **kwargs)

        return wrapped

    def _opening(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not self.concerns(file):
                return function(file, mode, *args, **kwargs)
            if self.strikes("open"):
                self.fail("open", file)
            opened = function(file, mode, *args, **kwargs)
            return opened if mode in ("r", "rb") else _Written(opened, self)

        return wrapped

    def _rust(self, module: Any) -> Callable[..., Any]:
        function = module.serialize_file

        def wrapped(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            if not self.concerns(path):
                function(tensors, path, *args, **kwargs)
                return
            if self.strikes("safetensors"):
                if self.kill:
                    _leave_half(function, tensors, Path(path))
                self._fail_rust()
            function(tensors, path, *args, **kwargs)
            if self.strikes("safetensors"):
                if not self.kill:
                    Path(path).unlink()
                self._fail_rust()

        return wrapped

    def _fail_rust(self) -> None:
        if self.kill:
            _exit(KILLED)
        text = f"Error while serializing: I/O error: {os.strerror(self.error)}"
        raise SafetensorError(f"{text} (os error {self.error})")


def _leave_half(function: Callable[..., Any], tensors: Any, path: Path) -> None:
    """What a kill in the middle of safetensors' write leaves."""
    function(tensors, path, metadata=None)
    half = path.with_name(".tmpKiLLeD")
    path.rename(half)
    os.truncate(half, half.stat().st_size // 2)


class _Written:
    """A file open for writing, whose `write` and `close` are operations."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self._file, self._faults = file, faults

    def write(self, data: Any) -> int:
        if self._faults.strikes("write"):
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            self._faults.fail("write", self._file.name)
        return int(self._file.write(data))

    def close(self) -> None:
        if self._faults.strikes("close"):
            os.truncate(self._file.name, 0)
            if not self._faults.kill:
                self._file.close()
            self._faults.fail("close", self._file.name)
        self._file.close()

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Within the block no file can grow beyond `size` bytes: the kernel fails the real calls, in
    any language, with EFBIG (a full disk's nearest kin that needs no privileges).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def forked(action: Callable[[], object], *, limit: int | None = None) -> int:
    """Run `action` in a forked child; its exit code, negative for the signal that ended it.

    With `limit`, the kernel kills the child in the very call that would let a file grow beyond
    so many bytes (SIGXFSZ, which Python otherwise ignores), in Rust's code too.
    """
    return ended(started(action, limit=limit))


def started(action: Callable[[], object], *, limit: int | None = None) -> int:
    """As `forked`, without waiting: the child's process id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: threads do not cross a fork
        child = os.fork()
    if child != 0:
        return child
    code = 1
    try:
        signal.alarm(LIFE)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        action()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        _exit(code)


def ended(child: int) -> int:
    """Wait for a child; its exit code, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
