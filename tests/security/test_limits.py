"""Attacks by too much, too long, too slow."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import ExitStack, suppress

from tests.security.conftest import Server
from tests.serve.sockets import ask, connected, rest, status, until, wait_until


def head(server: Server, length: int, key: str | None = None) -> bytes:
    """The head of a completion whose body is so long; the operator's if nobody is named."""
    bearer = f"Authorization: Bearer {server.operator if key is None else key}\r\n"
    return (
        f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n{bearer}content-length: {length}\r\n"
        "\r\n"
    ).encode()


def test_oversize_bodies(server: Server) -> None:
    with connected(server.port) as caller:  # nothing of it need be sent
        caller.sendall(head(server, 2**40))
        assert status(until(caller, b"}}")) == 413
    with connected(server.port) as caller:
        caller.sendall(head(server, 0).replace(b"content-length: 0", b"transfer-encoding: chunked"))
        for _ in range(80):
            caller.sendall(b"10000\r\n" + b"x" * 2**16 + b"\r\n")
        assert status(until(caller, b"}}")) == 413
    reply = ask(server.port, "/v1/completions", b" " * (4 * 2**20 + 1), key=server.operator)
    assert (reply.status, reply.error["code"]) == (413, "body_too_large")


def test_bombs_of_json(server: Server) -> None:
    for bomb in (b"[" * 10**6, b'{"a":' * 10**5, b"9" * 10**6, b'{"model": 1e999, "prompt": "x"}'):
        reply = ask(server.port, "/v1/completions", bomb, key=server.operator)
        assert reply.status == 400
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            assert ask(server.port, path, bomb, key=server.operator).status == 400


def test_too_long_prompts_and_answers(server: Server) -> None:
    for more, words in (
        ({"prompt": "x " * 2**20}, "the text is too long"),
        ({"prompt": "one two three " * 99}, "at most 256 have room"),
        ({"prompt": [3] * 257}, "at most 256 have room"),
        ({"max_tokens": 201}, "at most 200 are given"),
        ({"max_tokens": 10**30}, "at most 200 are given"),
        ({"n": 17}, "too many answers"),
        ({"prompt": ["x"] * 17}, "too many answers"),
        ({"n": 10**30}, "too many answers"),
        ({"stop": ["x"] * 10**4}, ""),
        ({"prompt": [[10**30]]}, "does not know"),
        ({"seed": 10**30}, ""),
        ({"logprobs": 10**9}, ""),
        ({"top_k": -(10**30)}, ""),
        ({"prompt": "\ud800"}, "not Unicode"),
    ):
        reply = server.complete("base", **more)
        assert reply.status == 400, (str(more)[:50], reply.text[:200])
        assert words in reply.error["message"]
    assert server.engine.load == (0, 0, 0)


def test_header_bombs(server: Server) -> None:
    for lines in (b"x: " + b"y" * 10**5 + b"\r\n", b"a: b\r\n" * 10**4, b"x" * 10**5):
        with connected(server.port) as caller:
            with suppress(OSError):
                caller.sendall(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n" + lines + b"\r\n")
            found = rest(caller)
            assert found == b"" or status(found) == 400
    assert ask(server.port, "/healthz").status == 200


def test_slowloris(server: Server) -> None:
    """Many callers that send nothing, half a head, or half a body, each a byte now and then."""
    done = threading.Event()
    with ExitStack() as held:
        slow = [held.enter_context(connected(server.port)) for _ in range(30)]
        for number, caller in enumerate(slow):
            caller.sendall([b"", b"GET /v1/models HT", head(server, 1000)][number % 3])

        def drip() -> None:
            while not done.wait(0.1):
                for number, caller in enumerate(slow):
                    if number % 3:
                        try:
                            caller.send(b"x")
                        except OSError:
                            continue

        dripping = threading.Thread(target=drip)
        dripping.start()
        assert server.complete("base").status == 200, "others are answered meanwhile"
        found = [rest(caller) for caller in slow]
        done.set()
        dripping.join()
    assert {status(each) for each in found if each} == {408}


def test_a_stream_that_nobody_reads_is_cut_off(server: Server) -> None:
    asked = {
        "model": "tenant-model",
        "prompt": "One",
        "max_tokens": 200,
        "n": 8,
        "logprobs": 5,
        "stream": True,
        "temperature": 2,
        "seed": 1,
    }
    body = json.dumps(asked).encode()
    with connected(server.port) as caller:
        caller.sendall(head(server, len(body), server.tenant) + body)
        caller.recv(1, socket.MSG_PEEK)
        assert server.complete("base").status == 200, "others are answered meanwhile"
        # The key may wait for 8 answers: it waits for these until the server gives up on it.
        wait_until(lambda: server.complete("tenant-model", server.tenant).status != 429)
        found = rest(caller)
    assert status(found) == 200
    assert b"[DONE]" not in found
    wait_until(lambda: server.engine.load == (0, 0, 0))


def test_callers_that_vanish_free_their_rows(server: Server) -> None:
    body = json.dumps({"model": "base", "prompt": "One", "max_tokens": 200, "stream": True})
    for wait in (True, False):
        with connected(server.port) as caller:
            caller.sendall(head(server, len(body)) + body.encode())
            if wait:
                until_some = caller.recv(100)
                assert status(until_some) == 200
    wait_until(lambda: server.engine.load == (0, 0, 0))
    assert server.complete("base").status == 200
