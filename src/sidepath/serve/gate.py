"""Who may ask what of a server (floor 5; extra `serve`).

With keys, each route but those of `OPEN` takes one. Without, whoever reaches this machine's
loopback may ask, and nobody may change anything. Pages of other origins may neither: a browser
names the page in `Origin`, and the name this server was called by must be the same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request as Incoming
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sidepath.errors import NotAllowed, Overloaded, ServeError, TooOften, UnknownCaller
from sidepath.serve.keys import Key, Keys
from sidepath.serve.rates import Bucket
from sidepath.serve.refusals import refusal

OPEN = frozenset({"/", "/healthz", "/readyz", "/openapi.json"})
"""Paths that need no key: they tell nothing that a caller put in."""
GUESSES_PER_MINUTE = 60
"""Wrong keys that are answered as such; more are told to wait."""
_CALLER = "sidepath.caller"
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
"""On every answer: no page of another origin may embed it, as a script say."""


class Caller:
    """Who asks, what it may, and how much of it is under way. For the server's loop alone."""

    def __init__(self, key: Key, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self.admin = key.name, key.admin
        self.models = None if key.models is None else frozenset(key.models)
        self._at_once, self._begun = key.at_once, 0
        rate = key.requests_per_minute
        self._bucket = None if rate is None else Bucket(rate, clock)

    def may_ask(self, model: str) -> bool:
        """Whether it may know of a model of this name."""
        return self.models is None or model in self.models

    def count(self) -> None:
        """One request more. Errors: `TooOften`."""
        wait = 0.0 if self._bucket is None else self._bucket.take()
        if wait:
            hint = f"ask again in {wait:.1f} s"
            raise TooOften("this key has asked too often", after=wait, hint=hint)

    def begin(self, answers: int) -> None:
        """So many answers more are waited for. Errors: `TooOften`."""
        if self._at_once is not None and self._begun + answers > self._at_once:
            raise TooOften(
                f"this key may wait for {self._at_once} answers at once, and waits for"
                f" {self._begun} already",
                hint="ask again once one has ended",
            )
        self._begun += answers

    def end(self, answers: int) -> None:
        """So many are not waited for any more."""
        self._begun -= answers


class Gate:
    """The callers of one server, by their keys."""

    def __init__(
        self, keys: Keys | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._keys = keys
        self._callers: dict[Key, Caller] = {}
        if keys is not None:
            self.renew(keys)
        self._anybody = Caller(Key(name="anybody"), clock)
        self._guesses = Bucket(GUESSES_PER_MINUTE, clock)

    def caller(self, authorization: str | None) -> Caller:
        """Who sends this header. Errors: `UnknownCaller`; `TooOften` for a key that has asked too
        often, and for wrong keys once there were many. A right one is never kept out by others'
        wrong ones.
        """
        if self._keys is None:
            return self._anybody
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise UnknownCaller("a key is needed", hint="send the header Authorization: Bearer KEY")
        key = self._keys.of(given.strip())
        if key is None:
            wait = self._guesses.take()
            if wait:
                raise TooOften("too many wrong keys were sent", after=wait)
            raise UnknownCaller("the key was given to nobody", hint="serve --new-key makes keys")
        caller = self._callers[key]
        caller.count()
        return caller

    def renew(self, keys: Keys) -> None:
        """Let these be the keys from now on. What was counted of a key that stays as it was stays;
        requests that were let through go on.
        """
        there = self._callers
        callers = {key: there.get(key) or Caller(key, self._clock) for key in keys.all}
        self._keys, self._callers = keys, callers


def sent_by(scope: Scope, caller: Caller) -> None:
    """Say who sends a request: after the gate, or after another process' gate, has let it in."""
    scope[_CALLER] = caller


def caller_of(incoming: Incoming) -> Caller:
    """Who sent a request that was let through."""
    caller: Caller = incoming.scope[_CALLER]
    return caller


def administrator(incoming: Incoming) -> Caller:
    """The same, for routes that change something. Errors: `NotAllowed` for all other keys."""
    caller = caller_of(incoming)
    if not caller.admin:
        raise NotAllowed(
            "this changes what is served",
            expected="an admin key",
            hint="serve --keys FILE --new-key NAME --key-admin makes one",
        )
    return caller


def refuse_scoped(incoming: Incoming) -> None:
    """Errors: `NotAllowed` for keys that may not ask every model, on routes that name them all."""
    if caller_of(incoming).models is not None:
        raise NotAllowed("the metrics name every model", expected="a key that may ask every model")


class Guard:
    """Asks the gate before each request reaches the application."""

    def __init__(self, app: ASGIApp, gate: Gate, told: Callable[[int], None]) -> None:
        """`told` gets each response's status."""
        self._app, self._gate, self._told = app, gate, told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        begun = False

        async def answer(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self._told(message["status"])
                MutableHeaders(scope=message).raw.extend(_HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        try:
            refuse_other_origins(headers)
            if scope["path"] not in OPEN:
                sent_by(scope, self._gate.caller(headers.get("authorization")))
        except ServeError as error:
            await refusal(error)(scope, receive, answer)
            return
        try:
            await self._app(scope, receive, answer)
        except asyncio.CancelledError:  # the server ends, and has waited long enough
            if not begun:
                await refusal(Overloaded("the server ends"))(scope, receive, answer)


def refuse_other_origins(headers: Headers) -> None:
    """Errors: `NotAllowed` where a page sent the request that does not come from here."""
    origin = headers.get("origin")
    if origin is not None and _place(origin) != headers.get("host", "").lower():
        raise NotAllowed("pages of other origins may not ask", found=origin[:200])


def _place(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None
