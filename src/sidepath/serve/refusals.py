"""Errors as OpenAI's clients read them (floor 5; extra `serve`)."""

from __future__ import annotations

import math
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as Incoming
from starlette.responses import JSONResponse, Response

from sidepath.errors import (
    NameTaken,
    NotAllowed,
    Outdated,
    Overloaded,
    ReplicaLost,
    RequestRefused,
    ServeError,
    SidepathError,
    TooLarge,
    TooOften,
    UnknownAdapter,
    UnknownCaller,
)

_KINDS: tuple[tuple[type[SidepathError], int, str | None], ...] = (
    (UnknownCaller, 401, "invalid_api_key"),
    (NotAllowed, 403, "not_allowed"),
    (UnknownAdapter, 404, "model_not_found"),
    (NameTaken, 409, "name_taken"),
    (Outdated, 409, "generation_changed"),
    (TooLarge, 413, "body_too_large"),
    (RequestRefused, 400, None),
    (TooOften, 429, "rate_limit_exceeded"),
    (Overloaded, 503, "overloaded"),
    (ReplicaLost, 500, "replica_lost"),
    (SidepathError, 500, None),
)
"""The first that an error is of gives its status and its code."""
_LONGEST = 4000
"""Characters of a message."""


def status_of(error: SidepathError) -> int:
    """The HTTP status that an error is told with."""
    return _kind(error)[0]


def _kind(error: SidepathError) -> tuple[int, str | None]:
    return next((status, code) for kind, status, code in _KINDS if isinstance(error, kind))


def error_document(error: SidepathError) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return _document(str(error), *_kind(error))


def _document(message: str, status: int, code: str | None) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    # It may repeat what was sent: be it half of a character, or a novel.
    message = message[:_LONGEST].encode(errors="replace").decode()
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def refusal(error: SidepathError) -> Response:
    """An error as a response."""
    status = status_of(error)
    headers = {"WWW-Authenticate": 'Bearer realm="sidepath"'} if status == 401 else {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(max(1, math.ceil(error.after)))
    return JSONResponse(error_document(error), status, headers)


async def _ours(incoming: Incoming, error: Exception) -> Response:
    assert isinstance(error, SidepathError)
    return refusal(error)


async def _of_starlette(incoming: Incoming, error: Exception) -> Response:
    """No such route, or not with this method."""
    assert isinstance(error, HTTPException)
    document = _document(error.detail, error.status_code, None)
    return JSONResponse(document, error.status_code, error.headers)


async def _left(incoming: Incoming, error: Exception) -> Response:
    """The caller went away in the middle of its body: nobody reads this."""
    return Response(status_code=400)


async def _broken(incoming: Incoming, error: Exception) -> Response:
    """A fault of the server's own; what it was goes to the log, not to the caller."""
    return refusal(ServeError("the server failed"))


HANDLERS: Any = {
    Exception: _broken,
    SidepathError: _ours,
    HTTPException: _of_starlette,
    ClientDisconnect: _left,
}
"""What Starlette answers with for each error."""
