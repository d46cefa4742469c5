"""A server on a real socket in this process, and callers that write their own bytes."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

from sidepath.cli.gating import web_server
from sidepath.cli.serve_run import HOST, ServeRun
from sidepath.cli.serving import listening

PATIENCE = 60
"""Seconds after which a test gives up on a server that does nothing."""


@contextmanager
def served(application: Any, *, small: bool = False, **settings: Any) -> Iterator[int]:
    """Serve an application as `sidepath serve` does, with these settings of it; gives the port.
    With `small` buffers little is on its way to whoever does not read.
    """
    with listening(0) as bound:
        if small:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        server = web_server(ServeRun(**settings), application)
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        try:
            yield bound.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()


@contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    """A connection, with small buffers, that no test waits on for ever."""
    with socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        caller.settimeout(PATIENCE)
        caller.connect((HOST, port))
        yield caller


def rest(caller: socket.socket) -> bytes:
    """All that still comes until the server closes the connection, be it by a reset."""
    found = b""
    try:
        while part := caller.recv(65536):
            found += part
    except ConnectionResetError:
        pass
    return found


def until(caller: socket.socket, end: bytes) -> bytes:
    """What comes until it ends so."""
    found = b""
    while not found.endswith(end):
        part = caller.recv(65536)
        assert part, found
        found += part
    return found


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for something that has to come."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def status(response: bytes) -> int:
    """The status of a response that came as bytes."""
    return int(response.split(b" ", 2)[1])


@dataclass(frozen=True)
class Said:
    """A response."""

    status: int
    headers: dict[str, str]
    text: str

    @property
    def document(self) -> Any:
        """Its JSON."""
        return json.loads(self.text)

    @property
    def error(self) -> Any:
        """What it says in OpenAI's form of an error."""
        error = self.document["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        return error


def ask(
    port: int,
    path: str,
    body: Any = None,
    *,
    key: str | None = None,
    method: str | None = None,
    headers: dict[str, str] | None = None,
) -> Said:
    """One request: a POST of JSON (or of bytes) where there is a body."""
    sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    more = {} if key is None else {"Authorization": f"Bearer {key}"}
    connection = HTTPConnection(HOST, port, timeout=PATIENCE)
    try:
        verb = method or ("GET" if body is None else "POST")
        connection.request(verb, path, sent, {**more, **(headers or {})})
        reply = connection.getresponse()
        named = {name.lower(): value for name, value in reply.getheaders()}
        return Said(reply.status, named, reply.read().decode())
    finally:
        connection.close()
