"""What every server tells of itself, and the application around its routes (floor 5; extra
`serve`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as Incoming
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from sidepath.serve.gate import Gate, Guard, caller_of, refuse_scoped
from sidepath.serve.metrics import Counted
from sidepath.serve.names import Names
from sidepath.serve.refusals import HANDLERS
from sidepath.serve.worker import Worker

HOSTS = ("127.0.0.1", "localhost")


class About:
    """The routes that all servers have: models, health, counts, and the document of the API."""

    def __init__(
        self, worker: Worker, names: Names, counted: Counted, document: Mapping[str, Any]
    ) -> None:
        self._worker, self._names = worker, names
        self._counted, self._document = counted, document

    def application(self, own: Sequence[BaseRoute], gate: Gate) -> Starlette:
        """These routes and a server's `own` behind a gate; every response is counted."""
        routes = [
            *own,
            Route("/v1/models", self._models),
            Route("/healthz", self._healthy),
            Route("/readyz", self._ready),
            Route("/metrics", self._metrics),
            Route("/openapi.json", self._openapi),
        ]
        return guarded(routes, gate, self._counted.responded)

    async def _models(self, incoming: Incoming) -> Response:
        listed = self._names.listed(caller_of(incoming))
        return JSONResponse({"object": "list", "data": listed})

    async def _healthy(self, incoming: Incoming) -> Response:
        return _said(self._worker.alive, "ok", f"the {self._worker.called} has ended")

    async def _ready(self, incoming: Incoming) -> Response:
        return _said(self._worker.alive and not self._worker.closed, "ready", "not ready")

    async def _metrics(self, incoming: Incoming) -> Response:
        refuse_scoped(incoming)
        return PlainTextResponse(self._counted.text(), media_type=self._counted.media_type)

    async def _openapi(self, incoming: Incoming) -> Response:
        return JSONResponse(self._document)


def guarded(routes: Sequence[BaseRoute], gate: Gate, told: Callable[[int], None]) -> Starlette:
    """Routes behind a gate; `told` gets each response's status.

    They answer callers of this machine that name it so: a page from elsewhere, whose own name was
    made to point here, does not (`HOSTS`).
    """
    before = [
        Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False),
        Middleware(Guard, gate=gate, told=told),
    ]
    return Starlette(routes=routes, exception_handlers=HANDLERS, middleware=before)


def _said(well: bool, yes: str, no: str) -> Response:
    return PlainTextResponse(yes if well else no, 200 if well else 503)
