"""A thread that works through what was left for it, alone with its model (floor 5)."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

from torch import nn

from sidepath.core.laid_out import lay_out, put_back
from sidepath.errors import ServeError
from sidepath.serve.adapters import Adapters
from sidepath.serve.errands import Errands
from sidepath.serve.tiers import Memory
from sidepath.serve.versions import Version


class Worker(ABC):
    """What the engine and the encoder are made of: requests that wait, one thread that answers them
    step by step, and adapters that come and go between two steps.

    `with worker:` lets a thread step; without it, call `step` yourself. Nobody is left waiting by a
    thread that failed.
    """

    called = "worker"
    """What messages and the thread call it."""

    def __init__(
        self,
        model: nn.Module,
        memory: Memory | None,
        forget: Callable[[str], None],
        gone: Callable[[str], None],
        *,
        merged: bool = False,
        laid_out: bool = True,
    ) -> None:
        """`forget` and `gone` are told of adapters that left the model, and the server.
        `laid_out`: until it is closed, see `core/laid_out.py`.
        """
        self._model = model
        if laid_out:
            lay_out(model)
        self.closed = False
        """Whether new requests are refused."""
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._errands = Errands(self._wake.set)
        self.adapters = Adapters(model, self._errands, forget, gone, self._rank, memory, merged)
        """Those that can be asked for by name: `register`, `load`, `unload`, `pin`, `versions`,
        from any thread."""
        self._thread: threading.Thread | None = None

    # --- what each of them does its own way

    @abstractmethod
    def _end_cancelled(self) -> None:
        """End the requests that nobody waits for any more."""

    @abstractmethod
    def _answer(self) -> bool:
        """Compute what can be computed now; returns whether there was anything."""

    @abstractmethod
    def _waits(self) -> bool:
        """Whether anybody has no answer yet."""

    @abstractmethod
    def _wanted(self) -> list[str]:
        """The adapters that are away and asked for, by their oldest request; under the lock."""

    @abstractmethod
    def _runs(self, version: Version) -> bool:
        """Whether a request of it is half answered; under the lock."""

    @abstractmethod
    def _since(self, version: Version) -> int | None:
        """When the oldest request that waits for it came; None: nobody waits. Under the lock."""

    @abstractmethod
    def _give_up(self, version: Version, error: Exception) -> None:
        """End the requests of an adapter that could not be brought."""

    @abstractmethod
    def _end_all(self, error: BaseException) -> None:
        """End every request: the thread itself has failed."""

    # --- steps, by one thread

    def step(self) -> bool:
        """One step: returns False when there was nothing to do. Not while a thread steps.

        Where nothing can be computed before an adapter has come, it waits for that.
        """
        self._wake.clear()
        self._errands.run()
        self.adapters.tidy()
        with self._errands.turn:
            self._end_cancelled()
            self._bring()
            for version, error in self.adapters.failures():
                self._give_up(version, error)
            if self._answer():
                return True
            coming = self.adapters.busy
        if coming:
            self._wake.wait()
        return coming

    def _bring(self) -> None:
        """Begin to bring the adapters that are asked for and not there, as far as there is room:
        the oldest request's first, or it might never come.
        """
        with self._lock:
            wanted = self._wanted()
        for internal in wanted:
            if not self.adapters.bring(internal):
                return

    def _rank(self, version: Version, coming: Version) -> tuple[int, ...] | None:
        """Who leaves the model for one that comes: nobody who runs, or whose oldest request is
        older. First those that nobody waits for, the longest unused of them.
        """
        with self._lock:
            if self._runs(version):
                return None
            since, asked = self._since(version), self._since(coming)
        if since is None:
            return (0, version.used)
        return None if asked is None or since < asked else (1, -since)

    # --- the thread

    @property
    def alive(self) -> bool:
        """Whether its thread steps."""
        return self._thread is not None and self._thread.is_alive()

    def __enter__(self) -> Self:
        name = f"sidepath-{self.called}"
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Refuse new requests, and answer those that wait. The adapters stay on the model, whose
        layers are no longer laid out.
        """
        with self._lock:
            self.closed = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        else:
            while self.step():
                pass
        put_back(self._model)

    def _refuse_closed(self) -> None:
        if self.closed:
            raise ServeError(f"the {self.called} is closed", hint="start another one")

    def _work(self) -> None:
        self._errands.begin()
        try:
            while not (self.closed and not self._waits()):
                if not self.step() and not self.closed:
                    self._wake.wait()
        except BaseException as error:
            with self._lock:
                self.closed = True
            self._end_all(error)
            raise
        finally:
            self._errands.end()
            self.adapters.tidy()
