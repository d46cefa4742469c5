"""Each error with its status, in OpenAI's form."""

from __future__ import annotations

import json

import pytest
from starlette.applications import Starlette
from starlette.requests import Request as Incoming
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from sidepath import errors
from sidepath.errors import SidepathError, TooOften
from sidepath.serve.refusals import HANDLERS, refusal, status_of

STATUSES = {
    "UnknownCaller": 401,
    "NotAllowed": 403,
    "UnknownAdapter": 404,
    "NameTaken": 409,
    "Outdated": 409,
    "TooLarge": 413,
    "RequestRefused": 400,
    "TooOften": 429,
    "Overloaded": 503,
}


@pytest.mark.parametrize("name", sorted(errors.__dict__))
def test_every_error_has_a_status_and_the_form(name: str) -> None:
    kind = vars(errors)[name]
    if not (isinstance(kind, type) and issubclass(kind, SidepathError)):
        return
    response = refusal(kind('half a character "\ud800"'))
    assert response.status_code == STATUSES.get(name, 500)
    error = json.loads(bytes(response.body))["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"] == 'half a character "?"'
    assert error["type"] == (
        "server_error" if response.status_code >= 500 else "invalid_request_error"
    )
    assert ("retry-after" in response.headers) == (response.status_code in (429, 503))
    assert ("www-authenticate" in response.headers) == (response.status_code == 401)


@pytest.mark.parametrize(("after", "said"), [(0.01, "1"), (1.0, "1"), (1.2, "2"), (59.5, "60")])
def test_when_to_come_back(after: float, said: str) -> None:
    error = TooOften("often", after=after)
    assert status_of(error) == 429
    assert refusal(error).headers["retry-after"] == said


def test_a_fault_of_the_servers_own_says_nothing_of_it() -> None:
    async def broken(incoming: Incoming) -> Response:
        raise RuntimeError("a secret path")

    made = Starlette(routes=[Route("/", broken)], exception_handlers=HANDLERS)
    reply = TestClient(made, raise_server_exceptions=False).get("/")
    assert reply.status_code == 500
    assert reply.json()["error"]["message"] == "the server failed"
    missing = TestClient(made).get("/none")
    assert (missing.status_code, missing.json()["error"]["message"]) == (404, "Not Found")
