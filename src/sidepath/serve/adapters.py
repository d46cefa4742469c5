"""Adapters that come and go while the engine steps (floor 5)."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from functools import cached_property

from torch import nn

from sidepath.errors import ServeError, UnknownAdapter
from sidepath.injection.registry import check_name
from sidepath.serve.errands import Errands
from sidepath.serve.memory import trim
from sidepath.serve.reading import Checked, described, read
from sidepath.serve.scheduler import Standing
from sidepath.serve.tiers import Memory, Rank, Tiers
from sidepath.serve.versions import Version, Versions
from sidepath.store.fingerprint import Fingerprint, fingerprint
from sidepath.store.hub import ADAPTER, is_hub, local

Failure = tuple[Version, Exception]


class Adapters:
    """The adapters of one engine: `register` or `load` them, `unload` and `pin` them by name, from
    any thread. A folder is read and checked off the engine's thread; the model changes between two
    steps only.
    """

    def __init__(
        self,
        model: nn.Module,
        errands: Errands,
        forget: Callable[[str], None],
        gone: Callable[[str], None],
        rank: Rank,
        memory: Memory | None = None,
        merged: bool = False,
    ) -> None:
        self._model, self._errands, self._gone, self._rank = model, errands, gone, rank
        memory = memory if memory is not None else Memory()
        self.tiers = Tiers(model, memory, forget, merged)
        self._dedicated: str | None = None
        self._versions = Versions(self._drop)
        self._by_internal: dict[str, Version] = {}
        self._leaving: deque[Version] = deque()
        self._failures: deque[Failure] = deque()
        self._reading = threading.Lock()
        """Held while the model is looked at by another thread than the engine's, and by whoever
        changes which adapters are on it."""
        self.release, self.again = self._versions.release, self._versions.again

    # --- by name, from any thread

    def register(
        self, name: str, place: str | os.PathLike[str], *, allow_other_base: bool = False
    ) -> Version:
        """Let an adapter be asked for that stays where it is, a folder or a name on the hub, until
        somebody does. Its names, settings and manifest are checked, and its base; no weight is
        read. If the name is taken, older requests keep the version they started with.

        Errors: `DamagedAdapter`, `StoreError`, `WrongBase`, `BadName`; `RequestRefused` for methods
        that put positions before each row; `ServeError` for one larger than the memory there is.
        """
        check_name(None, name)
        version = self._versions.new(name, os.fspath(place), allow_other_base)
        if not is_hub(place):
            entry = described(place, None if allow_other_base else self._base)
            version.digest, version.config = entry.digest, entry.config
            version.size = entry.numbers * self._bytes_a_number
            self.tiers.refuse_large(version)
        self._publish(version)
        return version

    def load(
        self, name: str, place: str | os.PathLike[str], *, allow_other_base: bool = False
    ) -> Version:
        """Read an adapter and check it whole, now; load it anew if the name is taken.

        When this returns it answers new requests of that name; older ones keep the version they
        started with. It is on the model if room could be made by others that answer nobody, else
        in host memory.

        Errors: those of `sidepath.load` and of `register`; `RequestRefused` for an adapter that
        brings tokens. Nothing has changed then.
        """
        check_name(None, name)
        version = self._versions.new(name, os.fspath(place), allow_other_base)
        try:
            folder = local(place, ADAPTER)
            with self._reading:
                checked = read(self._model, folder, allow_other_base)
                self._errands.ask(lambda: self._placed(version, checked, _idle))
                self._publish(version)
        finally:
            self.tidy()
        return version

    def unload(self, name: str) -> Version:
        """Refuse new requests of this name from now on. The version leaves the model, and its
        memory is free, with its last request: `gone` is set then. Errors: `UnknownAdapter`.
        """
        return self._versions.retire(name)

    def versions(self) -> list[Version]:
        """The versions that can be asked for, in order of name."""
        found = self._versions.current()
        return [each for each in found if each.name == self._dedicated] if self.merged else found

    @property
    def merged(self) -> bool:
        """Whether one adapter answers alone, folded into the base, which is not served then."""
        return self.tiers.merged

    def dedicate(self, name: str) -> Version:
        """Let the one adapter that answers, merged into the base, be this one. Requests of the one
        before that were begun are answered first. Of an engine that serves merged only.

        Errors: `UnknownAdapter`, those of `load`; `MergeError` for what cannot be merged.
        """
        if not self.merged:
            raise ServeError("this engine routes its rows", hint="Engine(..., merged=True)")
        version = self._versions.known(name)
        try:
            folder = local(version.source, ADAPTER)
            with self._reading:
                checked = read(self._model, folder, version.allow_other_base)
                self._dedicated = name
                self._errands.ask(lambda: self._placed(version, checked, _idle))
        finally:
            self.tidy()
        return version

    def acquire(self, name: str | None) -> Version | None:
        """The version that answers a new request; None for the base.

        Errors: `UnknownAdapter`, with near names; for every other name too, the base's included,
        where one adapter is merged.
        """
        if self.merged and (name is None or name != self._dedicated):
            raise UnknownAdapter(
                f'no adapter "{name}" is served' if name else "the base is not served",
                found=f'"{self._dedicated}" is merged into it'
                if self._dedicated
                else "none is merged",
                hint="ask for the one that is merged, or serve without --merge",
            )
        return None if name is None else self._versions.acquire(name)

    def pin(self, name: str, *, pinned: bool = True) -> Version:
        """Let an adapter stay on the model once it is there; or, not `pinned`, leave as others do.

        Errors: `UnknownAdapter`; `ServeError` if what is pinned would not leave it room.
        """
        version = self._versions.known(name)
        others = [each for each in self._versions.current() if each.pinned and each is not version]
        if pinned and version.size + sum(each.size for each in others) > self.tiers.memory.resident:
            raise ServeError(
                f'"{name}" cannot be pinned: there is no room beside what is pinned already',
                found=", ".join(f'"{each.name}"' for each in others) or f"{version.size:,} bytes",
                expected=f"at most {self.tiers.memory.resident:,} bytes in all",
            )
        version.pinned = pinned
        return version

    def _publish(self, version: Version) -> None:
        self._by_internal[version.internal] = version
        self._versions.publish(version)

    @cached_property
    def _base(self) -> Fingerprint:
        with self._reading:
            return fingerprint(self._model)

    @cached_property
    def _bytes_a_number(self) -> int:
        return next(self._model.parameters()).dtype.itemsize

    # --- to the model and off it, for the engine

    def standing(self, internal: str) -> Standing:
        """Whether a version is on the model, by its name there."""
        return self._by_internal[internal].standing

    def bring(self, internal: str) -> bool:
        """Begin to bring a version to the model if room can be made for it; returns whether. Called
        by a thread that may change the model. Its standing, and `failures`, say what comes of it.
        """
        version = self._by_internal[internal]
        try:
            if len(self.tiers.coming) >= self.tiers.memory.reading:
                return False
            if not self.tiers.promise(version, self._rank):
                return False
        except ServeError as error:
            self._failures.append((version, error))
            return True
        checked = self.tiers.host.get(version)
        if checked is not None and self._reading.acquire(blocking=False):
            try:  # nothing has to be read: it answers in this very step
                self._placed(version, checked, self._rank)
            except Exception as error:
                self._failed((version, error))
            finally:
                self._reading.release()
            return True
        threading.Thread(
            target=self._fetch, args=(version,), name=f"sidepath-load-{version.name}", daemon=True
        ).start()
        return True

    @property
    def busy(self) -> bool:
        """Whether one is on its way."""
        return bool(self.tiers.coming)

    def failures(self) -> list[Failure]:
        """Versions that could not be brought since this was last asked, and why."""
        return [self._failures.popleft() for _ in range(len(self._failures))]

    def _fetch(self, version: Version) -> None:
        """Bring one version, on a thread of its own."""
        try:
            checked = self.tiers.host.get(version)
            folder = None if checked is not None else local(version.source, ADAPTER)
            with self._reading:
                if folder is not None:
                    checked = read(self._model, folder, version.allow_other_base)
                    self.tiers.reads += 1
                assert checked is not None
                found = checked
                self._errands.ask(lambda: self._placed(version, found, self._rank))
        except Exception as error:
            failure = version, error
            self._errands.ask(lambda: self._failed(failure))
        finally:
            self.tidy()
            self._errands.wake()

    def _placed(self, version: Version, checked: Checked, rank: Rank) -> None:
        if version.standing == "here":
            return
        if version.answering or not version.retired:
            self.tiers.place(version, checked, rank)
        else:
            self.tiers.withdraw(version)

    def _failed(self, failure: Failure) -> None:
        self.tiers.withdraw(failure[0])
        self._failures.append(failure)

    def _drop(self, version: Version) -> None:
        self._leaving.append(version)
        self.tidy()

    def tidy(self) -> None:
        """Take versions off the model that nobody asks any more, unless a folder is being checked
        against it; from another thread than the engine's: let the engine do so.
        """
        if not self._leaving:
            return
        if not self._errands.mine:
            self._errands.wake()
        elif self._reading.acquire(blocking=False):
            try:
                with self._errands.turn:
                    self._take_off()
            finally:
                self._reading.release()

    def _take_off(self) -> None:
        for _ in range(len(self._leaving)):
            version = self._leaving.popleft()
            if version.standing == "coming":  # it is dropped when it has come
                self._leaving.append(version)
                continue
            self.tiers.drop(version)
            self._gone(version.internal)
            self._by_internal.pop(version.internal, None)
            trim()
            version.gone.set()


def _idle(version: Version, coming: Version) -> tuple[int, ...] | None:
    """Those that answer nobody may leave, the longest unused first."""
    return None if version.answering else (version.used,)
