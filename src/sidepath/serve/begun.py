"""The answers that one body asked for, on their way from the engine into the server's loop
(floor 5; extra `serve`).
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request as Incoming

from sidepath.serve.engine import Engine
from sidepath.serve.gate import Caller
from sidepath.serve.metrics import Metrics
from sidepath.serve.protocol import Asked
from sidepath.serve.requests import Handle, Piece

Numbered = tuple[int, Piece]
T = TypeVar("T")


class Begun:
    """All answers of one body, begun all or none; `close` it whatever happens.

    Errors: those of `Engine.submit`; `TooOften` for more answers than the caller may wait for.
    """

    def __init__(
        self, engine: Engine, asked: Asked, adapter: str | None, caller: Caller, counted: Metrics
    ) -> None:
        self._queue: asyncio.Queue[Numbered] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.handles: list[Handle] = []
        """Those of the answers, in the body's order."""
        self._caller, self._count = caller, len(asked.requests)
        caller.begin(self._count)
        self._open = True
        try:
            for index, request in enumerate(asked.requests):
                request = dataclasses.replace(request, adapter=adapter, salt=caller.name)
                listen = self._listener(index, counted.watch(asked.model))
                self.handles.append(engine.submit(request, listen))
        except BaseException:
            self.close()
            raise

    def _listener(self, index: int, watch: Any) -> Any:
        def listen(piece: Piece) -> None:
            watch(piece)
            # A loop that has ended has nobody who would read it.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

        return listen

    async def first(self) -> Numbered:
        """The first piece of any answer. Errors: its own, so that a response can still say so."""
        index, piece = await self._queue.get()
        if piece.error is not None:
            raise piece.error
        return index, piece

    async def pieces(self, first: Numbered | None = None) -> AsyncIterator[Numbered]:
        """The pieces of all answers, with the number of each, until all have ended; `first` is one
        that was taken already.
        """
        left = self._count
        while left:
            index, piece = first or await self._queue.get()
            first = None
            left -= piece.finish is not None
            yield index, piece

    async def answers(self) -> list[list[Piece]]:
        """All pieces of each answer. Errors: that of the first that could not be given."""
        found: list[list[Piece]] = [[] for _ in self.handles]
        async for index, piece in self.pieces():
            if piece.error is not None:
                raise piece.error
            found[index].append(piece)
        return found

    def close(self) -> None:
        """End what has not ended; the caller may begin as many others."""
        if self._open:
            self._open = False
            self._caller.end(self._count)
            for handle in self.handles:
                handle.cancel()


async def unless_gone(incoming: Incoming, work: Awaitable[T]) -> T | None:
    """What comes of some work; None when the caller has gone before."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(incoming))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        watching.cancel()


async def _gone(incoming: Incoming) -> None:
    while (await incoming.receive())["type"] != "http.disconnect":
        pass
