"""Connections that do not wait for ever (floor 5; extra `serve`).

uvicorn bounds how long a connection may be idle between two requests, and how long an unfinished
head may be where it comes in pieces. It does not bound how long a head or a body may take to come,
how long a response may lie unread, or how many connections there are: that is done here.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_BYTES = 16 * 2**10
"""What h11 may hold of an unfinished head; a head of twice this length never gets through."""


@dataclass(frozen=True)
class Bounds:
    """How many connections there may be, and how long each may keep the server waiting."""

    connections: int = 512
    head_seconds: float = 10.0
    """For the whole head of a request, from connecting or from its first byte."""
    body_seconds: float = 60.0
    """For the whole body."""
    stall_seconds: float = 30.0
    """For what was sent and is not taken: then whoever does not read is cut off."""


class Bounded(H11Protocol):
    """One connection. `bounds` is set by `bounded`."""

    bounds = Bounds()
    _waits_for: str | None = None
    _clock: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Turn away one connection too many, else start the clock of its first head."""
        if len(self.connections) >= self.bounds.connections:
            self.transport = transport
            transport.write(_response("503 Service Unavailable", "too many connections"))
            transport.close()
            return
        super().connection_made(transport)
        # Writers wait, and the clock runs, from the first byte on that is not taken.
        transport.set_write_buffer_limits(high=0)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        for clock in (self._clock, self._stall):
            if clock is not None:
                clock.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Hand bytes on in pieces: h11 looks at its limit where a head is unfinished only."""
        for at in range(0, len(data), HEAD_BYTES):
            if self.transport.is_closing():
                return
            super().data_received(data[at : at + HEAD_BYTES])
        self._watch()

    def on_response_complete(self) -> None:
        """The next head may be under way already."""
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        """What was sent is not taken."""
        super().pause_writing()
        self._stall = self.loop.call_later(self.bounds.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It is taken now."""
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()

    def _watch(self) -> None:
        """Let the clock run for what the other side owes: a head, a body, or nothing."""
        owed = self._owed()
        if owed == self._waits_for:
            return
        if self._clock is not None:
            self._clock.cancel()
        self._waits_for, self._clock = owed, None
        if owed is not None:
            seconds = self.bounds.head_seconds if owed == "head" else self.bounds.body_seconds
            self._clock = self.loop.call_later(seconds, self._late)

    def _owed(self) -> str | None:
        state = self.conn.their_state
        if state is h11.SEND_BODY:
            return "body"
        # Between two requests uvicorn's own clock runs.
        return "head" if state is h11.IDLE and self.timeout_keep_alive_task is None else None

    def _late(self) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(_response("408 Request Timeout", "the request came too slowly"))
        self.transport.close()


def bounded(bounds: Bounds) -> type[Any]:
    """The class of connections within these bounds, for uvicorn's `Config(http=...)`."""
    return type("BoundedBy", (Bounded,), {"bounds": bounds})


def _response(status: str, message: str) -> bytes:
    """A whole response, for connections that have no request yet."""
    kind = "server_error" if status.startswith("5") else "invalid_request_error"
    body = f'{{"error":{{"message":"{message}","type":"{kind}","param":null,"code":null}}}}'
    head = f"HTTP/1.1 {status}\r\nconnection: close\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n{body}".encode()
