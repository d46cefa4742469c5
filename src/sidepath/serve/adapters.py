"""Adapters that come and go while the engine steps (floor 5)."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from torch import nn

from sidepath.errors import RequestRefused
from sidepath.injection.registry import check_name
from sidepath.injection.surgery import remove
from sidepath.serve.errands import Errands
from sidepath.serve.versions import Version, Versions
from sidepath.store.adapter import Opened, opened


class Adapters:
    """The adapters of one engine. A folder is read and checked by the thread that asks for it; the
    model changes between two steps only. Safe for several threads.
    """

    def __init__(self, model: nn.Module, errands: Errands, forget: Callable[[], None]) -> None:
        self._model, self._errands, self._forget = model, errands, forget
        self._versions = Versions(self._drop)
        self._leaving: deque[Version] = deque()
        self._reading = threading.Lock()
        """Held while the model is looked at by another thread than the engine's."""
        self.versions = self._versions.current
        self.acquire = self._versions.acquire
        self.release = self._versions.release

    def load(
        self, name: str, folder: str | os.PathLike[str], *, allow_other_base: bool = False
    ) -> Version:
        """Load a folder under a name, anew if the name is taken.

        When this returns it answers new requests of that name; older ones keep the version they
        started with.

        Errors: those of `sidepath.load`, and `RequestRefused` for methods that put positions
        before each row, and for adapters that bring tokens. Nothing has changed then.
        """
        check_name(None, name)
        version = self._versions.new(name, str(folder))
        try:
            with (
                self._reading,
                opened(self._model, Path(folder), allow_other_base=allow_other_base) as ready,
            ):
                _refuse_positions(ready, name)
                _refuse_tokens(ready, name)
                ready.loaded.settle()
                self._errands.ask(lambda: self._publish(ready, version))
        finally:
            self.tidy()
        return version

    def _publish(self, ready: Opened, version: Version) -> None:
        ready.stand_up(version.internal)
        self._versions.publish(version)

    def unload(self, name: str) -> Version:
        """Refuse new requests of this name from now on. The version leaves the model, and its
        memory is free, with its last request: `gone` is set then. Errors: `UnknownAdapter`.
        """
        return self._versions.retire(name)

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
        self._forget()
        while self._leaving:
            version = self._leaving.popleft()
            remove(self._model, version.internal)
            version.gone.set()


def _refuse_positions(ready: Opened, name: str) -> None:
    config = ready.contents.config
    if config.positions:
        raise RequestRefused(
            f'"{name}" cannot be served',
            found=f"{type(config).__name__}: it puts {config.positions} positions before each row",
            expected="a method that works beside the layers",
        )


def _refuse_tokens(ready: Opened, name: str) -> None:
    tokens = list(ready.contents.tokens)
    if tokens:
        raise RequestRefused(
            f'"{name}" cannot be served beside its base: it brings tokens, and all adapters share '
            "one tokenizer",
            found=", ".join(tokens[:5]),
            hint="merge it, and serve the merged model: sidepath merge BASE ADAPTER OUT",
        )
