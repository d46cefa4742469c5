"""Connections that keep the server waiting, on real sockets, before an application of no model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from sidepath.serve.connection import HEAD_BYTES
from sidepath.serve.gate import Gate, Guard
from tests.serve.sockets import ask, connected, rest, served, status, until

SLOW = {"head_seconds": 0.3, "body_seconds": 0.3, "stall_seconds": 0.3}


class Application:
    """Gives back how long the body was; at /endless it writes until it is stopped, and at /never it
    does not.
    """

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.stopped = threading.Event()
        self.gone = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/endless":
            await self.endless(receive, send)
            return
        if scope["path"] == "/never":
            self.begun.set()
            await asyncio.Event().wait()
        length = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.gone.set()
                return
            length += len(message["body"])
            if not message["more_body"]:
                break
        body = str(length).encode()
        head = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": body})

    async def endless(self, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

        async def write() -> None:
            while True:
                await send({"type": "http.response.body", "body": b"x" * 999, "more_body": True})
                self.begun.set()
                await asyncio.sleep(0)

        writing = asyncio.ensure_future(write())
        while (await receive())["type"] != "http.disconnect":
            pass
        writing.cancel()
        self.stopped.set()


@pytest.fixture(scope="module")
def application() -> Application:
    return Application()


@pytest.fixture(scope="module")
def port(application: Application) -> Iterator[int]:
    with served(application, small=True, **SLOW) as port:
        yield port


def test_what_comes_in_time_is_answered(port: int) -> None:
    assert ask(port, "/", b"x" * 300_000).text == "300000"
    with connected(port) as caller:
        for number in range(3):
            caller.sendall(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nab")
            caller.sendall(str(number).encode())
            assert until(caller, b"3").startswith(b"HTTP/1.1 200")


def test_pipelined_requests_are_answered_in_turn(port: int) -> None:
    with connected(port) as caller:
        caller.sendall(b"GET /a HTTP/1.1\r\nhost: a\r\n\r\n" * 2)
        caller.sendall(b"GET /a HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        assert rest(caller).count(b"HTTP/1.1 200") == 3


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HT",
        b"GET / HTTP/1.1\r\nhost: a\r\nx: ",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab",
    ],
)
def test_slow_heads_and_bodies_are_ended(port: int, sent: bytes) -> None:
    with connected(port) as caller:
        caller.sendall(sent)
        assert status(rest(caller)) == 408


def test_dripping_does_not_move_the_end(port: int) -> None:
    """A byte now and then, and a first request that was in time, win no more time."""
    for drip in (b"x", b""):
        with connected(port) as caller:
            caller.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
            assert until(caller, b"\r\n0")
            caller.sendall(b"POST / HTTP/1.1\r\nhost: a\r\n")
            if not drip:
                caller.sendall(b"content-length: 1000000\r\n\r\n")
            dripping = threading.Thread(target=_drip, args=(caller, drip or b"x"))
            dripping.start()
            found = rest(caller)
            dripping.join()
            assert found == b"" or status(found) == 408  # a reset may take the answer with it


def _drip(caller: Any, drip: bytes) -> None:
    try:
        while True:
            caller.sendall(drip)
            threading.Event().wait(0.02)
    except OSError:
        return


def test_a_body_that_ends_early_is_seen(port: int, application: Application) -> None:
    application.gone.clear()
    with connected(port) as caller:
        caller.sendall(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nab")
    assert application.gone.wait(60)


def test_whoever_does_not_read_is_cut_off(port: int, application: Application) -> None:
    with connected(port) as caller:
        caller.sendall(b"GET /endless HTTP/1.1\r\nhost: a\r\n\r\n")
        assert application.begun.wait(60)
        assert application.stopped.wait(60)
        assert ask(port, "/", b"abc").text == "3"


@pytest.mark.parametrize("pieces", [1, 50])
def test_heads_beyond_the_limit(port: int, pieces: int) -> None:
    line = b"x-filler: " + b"y" * 990 + b"\r\n"
    head = b"GET / HTTP/1.1\r\nhost: a\r\n" + line * (3 * HEAD_BYTES // 1000) + b"\r\n"
    with connected(port) as caller:
        size = len(head) // pieces
        try:
            for at in range(0, len(head), size):
                caller.sendall(head[at : at + size])
        except OSError:
            pass
        found = rest(caller)
        assert found == b"" or status(found) == 400
    small = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n" + line * 10 + b"\r\n"
    with connected(port) as caller:
        caller.sendall(small)
        assert status(rest(caller)) == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        b"GET / HTTP/1.1\r\nhost: a\r\nbad header\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nx: a\0b\r\n\r\n",
    ],
)
def test_what_is_no_http(port: int, sent: bytes) -> None:
    with connected(port) as caller:
        caller.sendall(sent)
        assert status(rest(caller)) == 400


def test_one_connection_too_many_is_turned_away() -> None:
    with served(Application(), connections=2) as port, ExitStack() as held:
        first = held.enter_context(connected(port))
        second = held.enter_context(connected(port))
        for caller in (first, second):  # each is there once it is answered
            caller.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
            assert until(caller, b"\r\n0")
        third = held.enter_context(connected(port))
        assert status(rest(third)) == 503
        first.sendall(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        assert status(rest(first)) == 200
        assert ask(port, "/", b"ab").text == "2"


def test_an_end_that_does_not_wait_for_ever() -> None:
    application = Application()
    guarded = Guard(application, Gate(), lambda status: None)
    with ExitStack() as held:
        with served(guarded, drain_seconds=1) as port:
            caller = held.enter_context(connected(port))
            caller.sendall(b"GET /never HTTP/1.1\r\nhost: a\r\n\r\n")
            assert application.begun.wait(60)
        assert status(rest(caller)) == 503
