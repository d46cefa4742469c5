"""The engine behind OpenAI's routes (floor 5; extra `serve`).

`model` names an adapter, or the base; a name that is neither is 404, never the base in its place.
What a caller did wrong is a 4xx before anything is scheduled, a full queue is 503 with
`Retry-After`, and a caller that goes away cancels what it asked for.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as Incoming
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from sidepath.errors import (
    Overloaded,
    RequestRefused,
    SidepathError,
    TooLarge,
    UnknownAdapter,
    meant,
)
from sidepath.serve import playground
from sidepath.serve.engine import Engine
from sidepath.serve.metrics import Metrics
from sidepath.serve.protocol import Asked, Reply, parse
from sidepath.serve.requests import Handle, Piece

MOST_BYTES = 4 * 2**20
"""Longest body."""
HOSTS = ("127.0.0.1", "localhost")
Numbered = tuple[int, Piece]
T = TypeVar("T")


def application(engine: Engine, base: str) -> Starlette:
    """The server's application. `base` is the name that asks for the base alone.

    It answers callers of this machine that name it so: a page from elsewhere, whose own name was
    made to point here, does not (`HOSTS`).
    """
    served = _Served(engine, base)
    routes = [
        Route("/v1/models", served.models),
        Route("/v1/completions", served.completions, methods=["POST"]),
        Route("/v1/chat/completions", served.chat, methods=["POST"]),
        Route("/healthz", served.healthy),
        Route("/readyz", served.ready),
        Route("/metrics", served.metrics),
        *playground.routes(engine, base),
    ]
    failures: Any = {SidepathError: _failed}
    own = [Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)]
    return Starlette(routes=routes, exception_handlers=failures, middleware=own)


async def _failed(incoming: Incoming, error: Exception) -> Response:
    assert isinstance(error, SidepathError)
    return JSONResponse(error_document(error), *_status(error))


def _status(error: SidepathError) -> tuple[int, dict[str, str] | None]:
    if isinstance(error, Overloaded):
        return 503, {"Retry-After": "1"}
    kinds = {UnknownAdapter: 404, TooLarge: 413, RequestRefused: 400}
    return next((status for kind, status in kinds.items() if isinstance(error, kind)), 500), None


def error_document(error: SidepathError) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    status, _ = _status(error)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    code = {404: "model_not_found", 413: "body_too_large", 503: "overloaded"}.get(status)
    return {"error": {"message": str(error), "type": kind, "param": None, "code": code}}


class _Served:
    def __init__(self, engine: Engine, base: str) -> None:
        self.engine, self.base = engine, base
        self.counted = Metrics(engine)

    async def models(self, incoming: Incoming) -> Response:
        base: dict[str, Any] = {"id": self.base, "object": "model", "owned_by": "sidepath"}
        listed = [{**base, "parent": None}]
        for version in self.engine.adapters.versions():
            more = {"parent": self.base, "generation": version.generation}
            listed.append({**base, "id": version.name, **more})
        return JSONResponse({"object": "list", "data": listed})

    async def healthy(self, incoming: Incoming) -> Response:
        return _said(self.engine.alive, "ok", "the engine has ended")

    async def ready(self, incoming: Incoming) -> Response:
        return _said(self.engine.alive and not self.engine.closed, "ready", "not ready")

    async def metrics(self, incoming: Incoming) -> Response:
        return PlainTextResponse(self.counted.text(), media_type=self.counted.media_type)

    async def completions(self, incoming: Incoming) -> Response:
        return await self._complete(incoming, chat=False)

    async def chat(self, incoming: Incoming) -> Response:
        return await self._complete(incoming, chat=True)

    async def _complete(self, incoming: Incoming, *, chat: bool) -> Response:
        raw = await _body(incoming)
        tokenizer = self.engine.tokenizer
        asked = await asyncio.to_thread(parse, raw, chat, tokenizer)
        begun = _Begun(self.engine, asked, self._adapter(asked.model), self.counted)
        reply = Reply(asked, tokenizer)
        if asked.stream:
            return StreamingResponse(_stream(begun, reply, asked), media_type="text/event-stream")
        try:
            answers = await _unless_gone(incoming, begun.answers())
        finally:
            begun.cancel()
        return Response() if answers is None else JSONResponse(reply.whole(answers))

    def _adapter(self, model: str) -> str | None:
        if model == self.base:
            return None
        known = [version.name for version in self.engine.adapters.versions()]
        if model not in known:
            raise UnknownAdapter(
                f'no model "{model}" is served', hint=meant(model, [*known, self.base])
            )
        return model


async def _unless_gone(incoming: Incoming, work: Awaitable[T]) -> T | None:
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


async def _stream(begun: _Begun, reply: Reply, asked: Asked) -> AsyncIterator[str]:
    """Server-sent events: a document a piece, and `[DONE]` at the end."""
    try:
        async for index, piece in begun.pieces():
            if piece.error is not None:
                yield _event(error_document(piece.error))
            else:
                yield _event(reply.chunk(index, piece))
        if asked.usage:
            yield _event(reply.last())
        yield "data: [DONE]\n\n"
    finally:
        begun.cancel()


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"


def _said(well: bool, yes: str, no: str) -> Response:
    return PlainTextResponse(yes if well else no, 200 if well else 503)


async def _body(incoming: Incoming) -> bytes:
    raw = bytearray()
    async for part in incoming.stream():
        raw += part
        if len(raw) > MOST_BYTES:
            raise TooLarge("the body is too long", expected=f"at most {MOST_BYTES:,} bytes")
    return bytes(raw)


class _Begun:
    """The answers that one body asked for, begun all or none."""

    def __init__(self, engine: Engine, asked: Asked, adapter: str | None, counted: Metrics) -> None:
        self._queue: asyncio.Queue[Numbered] = asyncio.Queue()
        self._handles: list[Handle] = []
        loop = asyncio.get_running_loop()
        for index, request in enumerate(asked.requests):
            watch = counted.watch(asked.model)

            def listen(piece: Piece, index: int = index, watch: Any = watch) -> None:
                watch(piece)
                # A loop that has ended has nobody who would read it.
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

            try:
                request = dataclasses.replace(request, adapter=adapter)
                self._handles.append(engine.submit(request, listen))
            except BaseException:
                self.cancel()
                raise

    async def pieces(self) -> AsyncIterator[Numbered]:
        """The pieces of all answers, with the number of each, until all have ended."""
        left = len(self._handles)
        while left:
            index, piece = await self._queue.get()
            left -= piece.finish is not None
            yield index, piece

    async def answers(self) -> list[list[Piece]]:
        """All pieces of each answer. Errors: that of the first that could not be given."""
        found: list[list[Piece]] = [[] for _ in self._handles]
        async for index, piece in self.pieces():
            if piece.error is not None:
                raise piece.error
            found[index].append(piece)
        return found

    def cancel(self) -> None:
        """End what has not ended."""
        for handle in self._handles:
            handle.cancel()
