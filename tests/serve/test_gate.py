"""Who is let through: keys, rates, origins, and routes that change something."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request as Incoming
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from sidepath.errors import TooOften
from sidepath.serve.gate import GUESSES_PER_MINUTE, Caller, Gate, Guard, administrator, caller_of
from sidepath.serve.keys import Key, Keys, digest_of
from sidepath.serve.refusals import HANDLERS


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def key(name: str, **more: Any) -> Key:
    return Key(name=name, sha256=digest_of(f"{name}-secret"), **more)


KEYS = Keys([key("tenant"), key("slow", requests_per_minute=2.0), key("operator", admin=True)])


async def who(incoming: Incoming) -> Response:
    return JSONResponse(caller_of(incoming).name)


async def change(incoming: Incoming) -> Response:
    return JSONResponse(administrator(incoming).name)


async def healthy(incoming: Incoming) -> Response:
    return JSONResponse("ok")


def client(gate: Gate, told: list[int] | None = None) -> TestClient:
    routes = [
        Route("/who", who),
        Route("/change", change, methods=["POST"]),
        Route("/healthz", healthy),
    ]
    heard: list[int] = [] if told is None else told
    guard = Middleware(Guard, gate=gate, told=heard.append)
    made = Starlette(routes=routes, middleware=[guard], exception_handlers=HANDLERS)
    return TestClient(made, base_url="http://127.0.0.1:8000")


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def test_without_keys_anybody_may_ask_and_nobody_may_change() -> None:
    with client(Gate()) as asked:
        assert asked.get("/who").json() == "anybody"
        assert asked.get("/who", headers=bearer("whatever")).json() == "anybody"
        refused = asked.post("/change")
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "not_allowed"


def test_each_key_is_its_caller_and_only_an_admin_changes() -> None:
    told: list[int] = []
    with client(Gate(KEYS), told) as asked:
        for name in ("tenant", "slow", "operator"):
            assert asked.get("/who", headers=bearer(f"{name}-secret")).json() == name
        assert asked.post("/change", headers=bearer("tenant-secret")).status_code == 403
        assert asked.post("/change", headers=bearer("operator-secret")).json() == "operator"
    assert told == [200, 200, 200, 403, 200]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "tenant-secret"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": "Basic tenant-secret"},
        {"authorization": "Bearer tenant-secre"},
        {"authorization": "Bearer tenant-secret slow-secret"},
        {"authorization": f"Bearer {digest_of('tenant-secret')}"},
        {"authorization": "Bearer \xff\xfe"},
        {"x-api-key": "tenant-secret"},
    ],
)
def test_no_key_and_wrong_keys(headers: dict[str, str]) -> None:
    raw = {name: value.encode("latin-1") for name, value in headers.items()}
    with client(Gate(KEYS)) as asked:
        for path in ("/who", "/change", "/nowhere", "/who/"):
            reply = asked.get(path, headers=raw)  # type: ignore[arg-type]
            assert reply.status_code == 401
            assert reply.headers["www-authenticate"].startswith("Bearer")
            error = reply.json()["error"]
            assert error["code"] == "invalid_api_key"
            assert "tenant" not in error["message"]
        assert asked.get("/healthz", headers=raw).json() == "ok"  # type: ignore[arg-type]


def test_a_key_that_asks_too_often_is_told_when_to_come_back() -> None:
    clock = Clock()
    with client(Gate(KEYS, clock)) as asked:
        slow, tenant = bearer("slow-secret"), bearer("tenant-secret")
        statuses = [asked.get("/who", headers=slow).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]
        reply = asked.get("/who", headers=slow)
        assert reply.headers["retry-after"] == "30"
        assert reply.json()["error"]["code"] == "rate_limit_exceeded"
        assert asked.get("/who", headers=tenant).status_code == 200
        clock.now += 30
        assert asked.get("/who", headers=slow).status_code == 200


def test_wrong_keys_are_limited_and_keep_nobody_out() -> None:
    with client(Gate(KEYS, Clock())) as asked:
        count = int(GUESSES_PER_MINUTE)
        found = [asked.get("/who", headers=bearer(f"x{n}")).status_code for n in range(count + 5)]
        assert found == [401] * count + [429] * 5
        assert asked.get("/who", headers=bearer("tenant-secret")).status_code == 200


def test_answers_that_are_waited_for() -> None:
    caller = Caller(key("tenant", at_once=3))
    caller.begin(2)
    with pytest.raises(TooOften, match="3 answers at once, and waits for 2 already"):
        caller.begin(2)
    caller.begin(1)
    caller.end(2)
    caller.begin(2)


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        ("http://127.0.0.1:8000", 200),
        ("http://127.0.0.1:8001", 403),
        ("http://127.0.0.1", 403),
        ("http://localhost:8000", 403),
        ("https://evil.example", 403),
        ("null", 403),
        ("", 403),
        ("http://[", 403),
        ("http://127.0.0.1:8000.evil.example", 403),
        ("http://user@127.0.0.1:8000", 403),
    ],
)
def test_pages_of_other_origins(origin: str | None, status: int) -> None:
    headers = {} if origin is None else {"origin": origin}
    with client(Gate()) as asked:
        for path in ("/who", "/healthz"):
            reply = asked.get(path, headers=headers)
            assert reply.status_code == status
            assert reply.headers["cross-origin-resource-policy"] == "same-origin"
            assert not [name for name in reply.headers if name.startswith("access-control")]
        preflight = asked.options(
            "/change", headers={**headers, "access-control-request-method": "POST"}
        )
        assert preflight.status_code == (405 if status == 200 else 403)
