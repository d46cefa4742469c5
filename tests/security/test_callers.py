"""Attacks of those who have no key, another's key, or a key that may not do that."""

from __future__ import annotations

from typing import Any

import pytest

from sidepath.serve.gate import OPEN
from sidepath.serve.http import application
from tests.security.conftest import Server
from tests.serve.sockets import ask, connected, rest, status

CHANGING = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
ASKING = {"/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/classify"}
READING = {"/v1/models", "/v1/library", "/v1/load", "/metrics"}


@pytest.mark.parametrize("path", [*CHANGING, *sorted(ASKING | READING), "/nowhere"])
def test_no_route_without_a_key(server: Server, path: str) -> None:
    body = {"lora_name": "x", "lora_path": "0", "model": "base", "prompt": "x"}
    for key in (None, server.operator[:-1], server.tenant + "="):
        reply = ask(server.port, path, body, key=key)
        assert reply.status == 401
        assert reply.error["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"].startswith("Bearer")
    assert server.names() == ["tenant-model"]


def test_the_open_routes_tell_nothing_of_tenants(server: Server) -> None:
    for path in OPEN:
        reply = ask(server.port, path)
        assert reply.status in (200, 404)
        assert "tenant" not in reply.text


def test_every_route_that_changes_something_wants_an_admin_key(server: Server) -> None:
    """Of all routes that take a body, those that do not only ask refuse a tenant."""
    routes = application(server.engine, "base").routes
    taking = {
        str(getattr(route, "path", "")) for route in routes if "GET" not in (_methods(route) or ())
    }
    assert taking >= {*CHANGING, "/v1/completions"}
    for path in taking - ASKING:
        reply = server.post(path, server.tenant, lora_name="tenant-model", lora_path="0")
        assert (reply.status, reply.error["code"]) == (403, "not_allowed")
    assert server.names() == ["tenant-model"]


def _methods(route: object) -> set[str]:
    return getattr(route, "methods", None) or set()


def test_guesses_are_told_to_wait_and_keep_nobody_out(server: Server) -> None:
    guesses = (ask(server.port, "/v1/models", key=f"sp-{n}") for n in range(500))
    first = next(reply for reply in guesses if reply.status != 401)
    assert (first.status, first.error["code"]) == (429, "rate_limit_exceeded")
    assert int(first.headers["retry-after"]) >= 1
    assert ask(server.port, "/v1/models", key=server.tenant).status == 200


def test_a_tenant_neither_sees_nor_asks_others(server: Server) -> None:
    assert server.load("secret-project", "1").status == 200
    try:
        listed = ask(server.port, "/v1/models", key=server.tenant).document["data"]
        assert [model["id"] for model in listed] == ["tenant-model"]
        library = ask(server.port, "/v1/library", key=server.tenant)
        assert [entry["id"] for entry in library.document["data"]] == ["tenant-model"]
        assert "secret" not in library.text
        for model in ("secret-project", "secret-projec", "base"):
            reply = server.complete(model, server.tenant)
            assert reply.status == 404
            assert "did you mean" not in reply.text
        assert ask(server.port, "/metrics", key=server.tenant).status == 403
        assert server.complete("tenant-model", server.tenant).status == 200
    finally:
        assert server.unload("secret-project").status == 200


@pytest.mark.parametrize("name", ["Base", "BASE", "tenant-mode", "tenant-model ", "", "../base"])
def test_an_unknown_name_is_never_answered_by_the_base(server: Server, name: str) -> None:
    for path, asked in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        reply = server.post(path, model=name, **asked)
        assert reply.status in (400, 404)  # the embedded base has no chat template
        assert "choices" not in reply.document


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "169.254.169.254", ""])
def test_names_made_to_point_here(server: Server, host: str) -> None:
    """DNS rebinding: the browser believes that this server is the page's own."""
    reply = ask(server.port, "/v1/models", key=server.operator, headers={"Host": host})
    assert reply.status == 400
    with connected(server.port) as caller:
        caller.sendall(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\n\r\n")
        assert status(rest(caller)) == 400


def test_pages_of_other_origins(server: Server) -> None:
    for origin in ("https://evil.example", "null", f"http://localhost:{server.port}"):
        headers = {"Origin": origin, "Content-Type": "text/plain"}
        for path in (*CHANGING, *ASKING, *READING, *OPEN):
            sent: dict[str, Any] | None = None if path in OPEN | READING else {}
            reply = ask(server.port, path, sent, key=server.operator, headers=headers)
            assert reply.status == 403
            assert not [name for name in reply.headers if name.startswith("access-control")]
        asked = {**headers, "Access-Control-Request-Method": "POST"}
        preflight = ask(server.port, CHANGING[0], method="OPTIONS", headers=asked)
        assert preflight.status == 403
    own = {"Origin": f"http://127.0.0.1:{server.port}"}
    reply = ask(server.port, "/v1/models", key=server.operator, headers=own)
    assert reply.status == 200
    assert reply.headers["cross-origin-resource-policy"] == "same-origin"


def test_more_at_once_than_a_key_may_wait_for(server: Server) -> None:
    reply = server.complete("tenant-model", server.tenant, n=9)
    assert (reply.status, reply.error["code"]) == (429, "rate_limit_exceeded")
    assert server.complete("tenant-model", server.tenant, n=8).status == 200
