"""The one entrance to several replicas: the gate, and who answers under which name (floor 5; extra
`serve`).

Keys, limits and bodies are those of `http.py`, and hold here, before anything reaches a replica. A
name becomes the version that answers it when a request is accepted, here alone, so that there is
nothing for replicas to disagree on (`shared.py`). A request whose replica ends before the first
word of its answer went out is sent to another: nobody has read anything of it. A stream that has
begun ends with an error that says so.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Protocol

from starlette.applications import Starlette
from starlette.requests import Request as Incoming
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from sidepath.errors import ReplicaLost, UnknownAdapter
from sidepath.serve import playground
from sidepath.serve.about import guarded
from sidepath.serve.begun import unless_gone
from sidepath.serve.bodies import Intake
from sidepath.serve.changing import Changing
from sidepath.serve.fleet_metrics import FleetMetrics
from sidepath.serve.gate import Caller, caller_of, refuse_scoped
from sidepath.serve.http import Terms
from sidepath.serve.names import Names
from sidepath.serve.openapi import document
from sidepath.serve.protocol import answers_of, body_of
from sidepath.serve.refusals import error_document
from sidepath.serve.replica import Sent, Standing
from sidepath.serve.shared import Shared, source_of
from sidepath.serve.versions import Version

ATTEMPTS = 3
"""Replicas that one request may be sent to: one that ends whoever answers it ends no more."""
FRESH_SECONDS = 1.0
"""How old what is told of the replicas may be: nobody makes them tell it more often."""


class Asked(Protocol):
    """The replicas, as far as requests need them."""

    def ask(self, sent: Sent) -> AsyncGenerator[Message, None]:
        """The response's messages. Errors: `ReplicaLost`, `Overloaded`."""

    async def standings(self) -> list[Standing]:
        """How each replica that answers stands."""


def ingress(replicas: Asked, shared: Shared, base: str, terms: Terms, *, chat: bool) -> Starlette:
    """The application at the entrance. `chat`: whether the base takes messages."""
    entrance = _Entrance(replicas, shared, base)
    changing = Changing(shared, base, terms.loading, entrance.intake, terms.drain_seconds)
    routes = [
        Route("/v1/models", entrance.models),
        Route("/v1/completions", entrance.ask, methods=["POST"]),
        Route("/v1/chat/completions", entrance.ask, methods=["POST"]),
        Route("/v1/load_lora_adapter", changing.load, methods=["POST"]),
        Route("/v1/unload_lora_adapter", changing.unload, methods=["POST"]),
        Route("/healthz", entrance.healthy),
        Route("/readyz", entrance.ready),
        Route("/metrics", entrance.metrics),
        Route("/openapi.json", entrance.openapi),
        *playground.routes(shared, base, entrance.load, chat=chat),
    ]
    return guarded(routes, terms.gate, entrance.counted.responded)


class _Entrance:
    def __init__(self, replicas: Asked, shared: Shared, base: str) -> None:
        self._replicas, self._shared = replicas, shared
        self._names = Names(shared, base)
        self._told: tuple[float, list[Standing]] = (-FRESH_SECONDS, [])
        self._telling = asyncio.Lock()
        self.counted, self.intake = FleetMetrics(), Intake()

    async def ask(self, incoming: Incoming) -> Response:
        """Send a request on to a replica."""
        caller = caller_of(incoming)
        async with self.intake.body(incoming) as raw:
            body = await asyncio.to_thread(body_of, raw)
        model = body.get("model")
        model = model if isinstance(model, str) else None
        version = None if model is None else self._version(caller, model)
        source = None if version is None else source_of(version)
        sent = Sent(incoming.url.path, raw, caller.name, model, source)
        answers = answers_of(body)

        def release() -> None:
            caller.end(answers)
            if version is not None:
                self._shared.release(version)

        try:
            caller.begin(answers)
        except BaseException:
            if version is not None:
                self._shared.release(version)
            raise
        return _Relayed(incoming, self._replicas, sent, self.counted, release)

    def _version(self, caller: Caller, model: str) -> Version | None:
        """What answers a name from now until the response has ended; None: the base."""
        adapter = self._names.adapter(caller, model)
        try:
            return None if adapter is None else self._shared.acquire(adapter)
        except UnknownAdapter as error:  # unloaded just now; the error names all others
            raise self._names.unknown(model, []) from error

    async def models(self, incoming: Incoming) -> Response:
        listed = self._names.listed(caller_of(incoming))
        return JSONResponse({"object": "list", "data": listed})

    async def healthy(self, incoming: Incoming) -> Response:
        """The entrance answers; replicas that have ended are started anew without it."""
        return PlainTextResponse("ok")

    async def ready(self, incoming: Incoming) -> Response:
        well = any(standing.alive for standing in await self._standings())
        return PlainTextResponse("ready" if well else "no replica answers", 200 if well else 503)

    async def metrics(self, incoming: Incoming) -> Response:
        refuse_scoped(incoming)
        text = self.counted.text(await self._standings())
        return PlainTextResponse(text, media_type=self.counted.media_type)

    async def openapi(self, incoming: Incoming) -> Response:
        return JSONResponse(document())

    async def load(self) -> dict[str, int]:
        """What all replicas have to do just now, and have done."""
        loads = [standing.load for standing in await self._standings()]
        return {name: sum(load[name] for load in loads) for name in (loads[0] if loads else ())}

    async def _standings(self) -> list[Standing]:
        async with self._telling:
            if time.monotonic() - self._told[0] > FRESH_SECONDS:
                self._told = time.monotonic(), await self._replicas.standings()
            return self._told[1]


class _Relayed(Response):
    """What a replica answers. However it ends, `release` is called."""

    def __init__(
        self,
        incoming: Incoming,
        replicas: Asked,
        sent: Sent,
        counted: FleetMetrics,
        release: Callable[[], None],
    ) -> None:
        super().__init__()
        self._incoming, self._replicas, self._sent = incoming, replicas, sent
        self._counted, self._release = counted, release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(self._incoming, self._passed(send))
        finally:
            self._release()

    async def _passed(self, send: Send) -> None:
        lost: ReplicaLost | None = None
        for _ in range(ATTEMPTS):
            passing = _Passing(send)
            try:
                async with aclosing(self._replicas.ask(self._sent)) as messages:
                    await passing.all(messages)
                return
            except ReplicaLost as error:
                lost = error
            if passing.begun:
                self._counted.cut.inc()
                await passing.cut()
                return
            self._counted.retried.inc()
        raise ReplicaLost(
            f"{ATTEMPTS} replicas ended one after the other while they answered this"
        ) from lost


class _Passing:
    """Messages on their way out: the head waits for the first bytes of the body."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = self.ended = False
        """Whether anything went out; whether everything did."""

    async def all(self, messages: AsyncGenerator[Message, None]) -> None:
        head = None
        try:
            async for message in messages:
                if message["type"] == "http.response.start":
                    head = message
                    continue
                if head is not None:
                    self.begun = True
                    await self._send(head)
                    head = None
                await self._send(message)
                self.ended = not message.get("more_body", False)
        except ReplicaLost:
            if not self.ended:
                raise

    async def cut(self) -> None:
        """Say that the rest does not come."""
        lost = ReplicaLost("the replica that answered has ended: the answer breaks off here")
        events = f"data: {json.dumps(error_document(lost))}\n\ndata: [DONE]\n\n"
        await self._send({"type": "http.response.body", "body": events.encode()})
