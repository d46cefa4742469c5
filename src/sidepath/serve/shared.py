"""The adapters of several replicas: one table of names, at their entrance (floor 5).

Which version answers a name is decided here; replicas know versions by keys and look no name up.
So a load is there for all callers at once, a generation is compared in one place, and a request
that is sent to a second replica is answered by the version that it was accepted for.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Protocol

from sidepath.errors import BadName, ServeError, SidepathError, StoreError, in_one_line
from sidepath.injection.registry import check_name
from sidepath.serve.replica import Source
from sidepath.serve.versions import Version, Versions
from sidepath.store.hub import is_hub


class Told(Protocol):
    """The replicas, as far as adapters need them. Not for the server's loop: all of it waits.

    Errors: `ReplicaLost` where one ends meanwhile, and what replicas themselves raise.
    """

    def load(self, source: Source) -> str | None:
        """Let one replica read an adapter and check it whole; returns its digest."""

    def have(self, sources: Sequence[Source]) -> list[list[str | SidepathError | None]]:
        """Let every replica know adapters: of each replica, each one's digest or error."""

    def forget(self, key: str) -> None:
        """Let every replica forget one."""


def source_of(version: Version) -> Source:
    """What a replica has to know of a version. Its key tells no name: Ray shows keys in figures
    that need no token.
    """
    key = f"generation-{version.generation}"
    return Source(key, version.source, version.allow_other_base, version.digest)


def _badly_named(version: Version) -> str | None:
    try:
        check_name(None, version.name)
    except BadName as error:
        return f"{version.source}: {in_one_line(error)}"
    return None


class Shared:
    """Names and versions, as an engine's `adapters` has them, for all replicas together."""

    merged = False

    def __init__(self, replicas: Told) -> None:
        self._replicas = replicas
        self._versions = Versions(self._drop)
        self.acquire, self.release = self._versions.acquire, self._versions.release

    def versions(self) -> list[Version]:
        """The versions that can be asked for, in order of name."""
        return self._versions.current()

    def register_all(
        self, found: Mapping[str, str | os.PathLike[str]], *, allow_other_base: bool
    ) -> None:
        """Let adapters be asked for, on every replica; no weight is read.

        Errors: one `StoreError` that names each that cannot be served.
        """
        new = [self._new(name, place, allow_other_base) for name, place in found.items()]
        faults = {version.name: fault for version in new if (fault := _badly_named(version))}
        for answers in self._replicas.have([source_of(version) for version in new]):
            for version, answer in zip(new, answers, strict=True):
                if isinstance(answer, SidepathError):
                    faults[version.name] = f"{version.source}: {in_one_line(answer)}"
                else:
                    version.digest = answer
        if faults:
            raise StoreError(
                f"{len(faults)} of {len(found)} adapters cannot be served",
                faults=list(faults.values()),
            )
        for version in new:
            self._versions.publish(version)

    def _new(self, name: str, place: str | os.PathLike[str], allow_other_base: bool) -> Version:
        where = os.fspath(place) if is_hub(place) else os.path.abspath(place)
        return self._versions.new(name, where, allow_other_base)

    def load(self, name: str, place: str | os.PathLike[str]) -> Version:
        """Let an adapter be asked for, read and checked whole by one replica and known to all when
        this returns; older requests of the name keep the version they were accepted for.

        Errors: those of `Adapters.load`. Nothing has changed then.
        """
        check_name(None, name)
        version = self._new(name, place, False)
        try:
            version.digest = self._replicas.load(source_of(version))
            for answers in self._replicas.have([source_of(version)]):
                for answer in answers:
                    if isinstance(answer, SidepathError):
                        raise answer
        except BaseException:
            self._drop(version)
            raise
        self._versions.publish(version)
        return version

    def unload(self, name: str) -> Version:
        """Refuse new requests of this name from now on; with its last request the version leaves
        every replica, and `gone` is set. Errors: `UnknownAdapter`.
        """
        return self._versions.retire(name)

    def _drop(self, version: Version) -> None:
        """Called wherever the last request ends, in the server's loop too: a thread waits."""
        threading.Thread(target=self._forget, args=(version,), name="sidepath-forget").start()

    def _forget(self, version: Version) -> None:
        with suppress(ServeError):  # whoever cannot be told has ended, and its memory is free
            self._replicas.forget(source_of(version).key)
        version.gone.set()
