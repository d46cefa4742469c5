"""Work that must be done between two steps: by the engine's thread, if it has one (floor 5)."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Errands:
    """A queue of things to do, each done while nothing else touches the model.

    While no thread has taken it over (`begin`), `ask` does the work itself.
    """

    def __init__(self, wake: Callable[[], object]) -> None:
        self.wake = wake
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._owner: threading.Thread | None = None
        self.turn = threading.RLock()
        """Held by whoever touches the model."""

    def begin(self) -> None:
        """The calling thread takes over: it will call `run` between steps."""
        with self._lock:
            self._owner = threading.current_thread()

    def end(self) -> None:
        """The calling thread goes: what still waits is done now."""
        with self._lock:
            self._owner = None
        self.run()

    @property
    def mine(self) -> bool:
        """Whether the calling thread may do things itself."""
        return self._owner in (None, threading.current_thread())

    def ask(self, work: Callable[[], T]) -> T:
        """Have something done, and wait for it. Errors: whatever `work` raises."""
        with self._lock:
            mine = self.mine
            if not mine:
                future: Future[T] = Future()
                self._waiting.append((work, future))
        if mine:
            with self.turn:
                return work()
        self.wake()
        return future.result()

    def run(self) -> None:
        """Do what waits."""
        while True:
            with self._lock:
                if not self._waiting:
                    return
                work, future = self._waiting.popleft()
            with self.turn:
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)
