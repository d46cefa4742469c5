"""The adapters that can be asked for by name, and the versions of them that still answer (floor 5).

Each load of a name is a version with a name of its own on the model, so that a request keeps the
one it started with. A version that was replaced or unloaded takes no new request and leaves the
model with its last one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from sidepath.errors import UnknownAdapter, meant
from sidepath.methods.base import Method
from sidepath.serve.scheduler import Standing


@dataclass(eq=False)
class Version:
    """One load of an adapter."""

    name: str
    generation: int
    """Counts the loads of all names, from 1."""
    source: str
    """The folder it comes from, or its name on the hub."""
    allow_other_base: bool = False
    size: int = 0
    """Bytes that it takes on the model; what its files say until it was there once."""
    digest: str | None = None
    """SHA-256 of its weights; None for a folder without a manifest until it was read once."""
    config: Method | None = None
    """Its settings, once they are known."""
    labels: tuple[str, ...] | None = None
    """A classifier's classes, once they are known."""
    standing: Standing = "away"
    pinned: bool = False
    """Whether it stays on the model, once it is there, though nobody asks for it."""
    used: int = 0
    """The number of the last request that asked for it, counted over all adapters."""
    answering: int = 0
    """Requests that it answers, waiting ones too."""
    retired: bool = False
    gone: threading.Event = field(default_factory=threading.Event)
    """Set when it has left the model."""

    @property
    def internal(self) -> str:
        """Its name on the model."""
        return f"serving-{self.generation}"


class Versions:
    """Names and versions. Safe for several threads; `drop` is called for each version that nobody
    asks any more, with no lock held.
    """

    def __init__(self, drop: Callable[[Version], None]) -> None:
        self._drop = drop
        self._lock = threading.Lock()
        self._current: dict[str, Version] = {}
        self._generations = self._asked = 0

    def current(self) -> list[Version]:
        """The version of each name, in order of name."""
        with self._lock:
            return [self._current[name] for name in sorted(self._current)]

    def new(self, name: str, source: str, allow_other_base: bool = False) -> Version:
        """A version to be loaded; nobody can ask for it before `publish`."""
        with self._lock:
            self._generations += 1
            return Version(name, self._generations, source, allow_other_base)

    def known(self, name: str) -> Version:
        """The version that answers a name. Errors: `UnknownAdapter` with near names."""
        with self._lock:
            return self._known(name)

    def publish(self, version: Version) -> None:
        """Let a version answer its name from now on; the one before is retired.

        Of two loads of one name at a time the one begun last stays, whichever is ready first.
        """
        with self._lock:
            before = self._current.get(version.name)
            if before is not None and before.generation > version.generation:
                before = version
            else:
                self._current[version.name] = version
                if before is not None:
                    version.pinned = before.pinned
            leaving = self._retired(before)
        self._drop_all(leaving)

    def retire(self, name: str) -> Version:
        """Let a name be unknown from now on. Errors: `UnknownAdapter`."""
        with self._lock:
            version = self._known(name)
            del self._current[name]
            leaving = self._retired(version)
        self._drop_all(leaving)
        return version

    def acquire(self, name: str) -> Version:
        """The version that answers a new request. Errors: `UnknownAdapter` with near names."""
        with self._lock:
            version = self._known(name)
            version.answering += 1
            self._asked += 1
            version.used = self._asked
            return version

    def again(self, version: Version, requests: int) -> None:
        """Let a version answer so many requests more than the one it was acquired for."""
        with self._lock:
            version.answering += requests

    def release(self, version: Version) -> None:
        """A request has ended."""
        with self._lock:
            version.answering -= 1
            leaving = [version] if version.retired and not version.answering else []
        self._drop_all(leaving)

    def _known(self, name: str) -> Version:
        if name not in self._current:
            loaded = ", ".join(f'"{known}"' for known in sorted(self._current)) or "none"
            raise UnknownAdapter(
                f'no adapter "{name}" is loaded',
                found=f"loaded: {loaded}",
                hint=meant(name, self._current),
            )
        return self._current[name]

    def _retired(self, version: Version | None) -> list[Version]:
        if version is None:
            return []
        version.retired = True
        return [] if version.answering else [version]

    def _drop_all(self, versions: list[Version]) -> None:
        for version in versions:
            self._drop(version)
