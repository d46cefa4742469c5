"""The engine behind OpenAI's routes (floor 5; extra `serve`).

`model` names an adapter, or the base; a name that is neither is 404, never the base in its place.
What a caller did wrong is a 4xx before anything is scheduled, a full queue is 503 with
`Retry-After`, and a caller that goes away cancels what it asked for.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as Incoming
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from sidepath.errors import UnknownAdapter
from sidepath.serve import playground
from sidepath.serve.about import About
from sidepath.serve.begun import Begun, Numbered, unless_gone
from sidepath.serve.bodies import Intake, Most, longest_text
from sidepath.serve.changing import Changing
from sidepath.serve.confined import Loading
from sidepath.serve.engine import Engine
from sidepath.serve.gate import Gate, caller_of
from sidepath.serve.metrics import Metrics
from sidepath.serve.names import Names
from sidepath.serve.openapi import document
from sidepath.serve.protocol import MOST_ANSWERS, Asked, parse
from sidepath.serve.refusals import HANDLERS, error_document
from sidepath.serve.replies import Reply


@dataclass(frozen=True)
class Terms:
    """On what terms a server answers: who may ask, how much, and what may be changed."""

    gate: Gate = field(default_factory=Gate)
    most: Most = field(default_factory=Most)
    loading: Loading | None = None
    """What may be loaded while it runs; None: nothing."""
    drain_seconds: float = 30.0
    """How long an unload waits for those who are being answered, before it says that they are."""


def application(
    engine: Engine, base: str, terms: Terms | None = None, more: Sequence[BaseRoute] = ()
) -> Starlette:
    """The server's application. `base` is the name that asks for the base alone; `more` are routes
    beside its own, which the same gate guards.
    """
    terms = terms if terms is not None else Terms()
    served = _Served(engine, Names(engine.adapters, base), terms.most, Metrics(engine))
    changing = Changing(engine.adapters, base, terms.loading, served.intake, terms.drain_seconds)
    routes = [
        *served.asking(),
        Route("/v1/load_lora_adapter", changing.load, methods=["POST"]),
        Route("/v1/unload_lora_adapter", changing.unload, methods=["POST"]),
        *playground.routes(engine.adapters, base, served.load, chat=chats(engine.tokenizer)),
        *more,
    ]
    about = About(engine, served.names, served.counted, document())
    return about.application(routes, terms.gate)


def unguarded(engine: Engine, names: Names, most: Most, counted: Metrics) -> Starlette:
    """The routes that ask a model, for callers that another process has let in (`ingress.py`):
    whoever sends a request has put its caller into the scope.
    """
    served = _Served(engine, names, most, counted)
    return Starlette(routes=served.asking(), exception_handlers=HANDLERS)


class _Served:
    def __init__(self, engine: Engine, names: Names, most: Most, counted: Metrics) -> None:
        self.engine, self.names = engine, names
        self.counted, self.intake = counted, Intake()
        longest = longest_text(engine.limits.context, MOST_ANSWERS, engine.tokenizer)
        self._most = dataclasses.replace(most, characters=most.characters or longest)

    def asking(self) -> list[Route]:
        """The routes that ask a model."""
        return [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]

    async def load(self) -> dict[str, int]:
        """Requests, rows and slots just now, and tokens so far."""
        return load_of(self.engine)

    async def completions(self, incoming: Incoming) -> Response:
        return await self._complete(incoming, chat=False)

    async def chat(self, incoming: Incoming) -> Response:
        return await self._complete(incoming, chat=True)

    async def _complete(self, incoming: Incoming, *, chat: bool) -> Response:
        tokenizer = self.engine.tokenizer
        async with self.intake.body(incoming) as raw:
            asked = await asyncio.to_thread(parse, raw, chat, tokenizer, self._most.check_text)
        self._most.check(asked)
        begun = self._begin(incoming, asked)
        reply = Reply(asked, tokenizer, begun.handles)
        try:
            if asked.stream:
                first = await unless_gone(incoming, begun.first())
                if first is not None:
                    return _Streamed(begun, _events(begun, first, reply, asked))
            else:
                answers = await unless_gone(incoming, begun.answers())
                if answers is not None:
                    begun.close()
                    return JSONResponse(reply.whole(answers))
        except BaseException:
            begun.close()
            raise
        begun.close()
        return Response()  # nobody reads it

    def _begin(self, incoming: Incoming, asked: Asked) -> Begun:
        caller = caller_of(incoming)
        adapter = self.names.adapter(caller, asked.model)
        try:
            return Begun(self.engine, asked, adapter, caller, self.counted)
        except UnknownAdapter as error:  # unloaded just now; the engine's error names all others
            raise self.names.unknown(asked.model, []) from error


class _Streamed(StreamingResponse):
    """Server-sent events. However the response ends, what has not ended of it is cancelled."""

    media_type = "text/event-stream"

    def __init__(self, begun: Begun, events: AsyncIterator[str]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache"})
        self._begun = begun

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._begun.close()


async def _events(begun: Begun, first: Numbered, reply: Reply, asked: Asked) -> AsyncIterator[str]:
    """A document a piece, and `[DONE]` at the end."""
    async for index, piece in begun.pieces(first):
        if piece.error is not None:
            yield _event(error_document(piece.error))
        else:
            yield _event(reply.chunk(index, piece))
    if asked.usage:
        yield _event(reply.last())
    yield "data: [DONE]\n\n"


def _event(document: dict[str, object]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"


def chats(tokenizer: Any) -> bool:
    """Whether a base takes messages."""
    return tokenizer is not None and bool(tokenizer.chat_template)


def load_of(engine: Engine) -> dict[str, int]:
    """How much an engine has to do just now, and has done, as the page shows it."""
    waiting, running, slots = engine.load
    return {
        "waiting": waiting,
        "running": running,
        "rows": engine.limits.rows,
        "slots_taken": slots,
        "slots": engine.limits.slots,
        "steps": engine.steps,
        "answered": engine.new_tokens,
    }
