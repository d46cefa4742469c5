"""One of several servers behind an ingress: a whole engine, and no gate (floor 5; extra `serve`).

It answers whatever the ingress sends it (`ingress.py`), which has let the caller in and chosen the
adapter. It knows an adapter under a key of the ingress' own, one for each load of a name, so that a
request is answered by the version that it was accepted for, on whichever replica. What it needs
to have that adapter comes with the request: a replica that was started anew just now knows none.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from starlette.types import Message, Receive, Scope, Send

from sidepath.errors import ServeError, SidepathError, StoreError, UnknownAdapter
from sidepath.serve.bodies import Most
from sidepath.serve.engine import Engine
from sidepath.serve.gate import Caller, sent_by
from sidepath.serve.http import load_of, unguarded
from sidepath.serve.keys import Key
from sidepath.serve.metrics import Metrics
from sidepath.serve.names import Names
from sidepath.serve.refusals import refusal


@dataclass(frozen=True)
class Source:
    """One load of an adapter."""

    key: str
    """What every replica calls it."""
    place: str
    """Its folder, or its name on the hub."""
    allow_other_base: bool = False
    digest: str | None = None
    """SHA-256 of its weights, where it is known: no other weights answer then."""


@dataclass(frozen=True)
class Sent:
    """A request that was let in."""

    path: str
    body: bytes
    caller: str
    """The name of who asks: nobody else gets what was computed for it."""
    model: str | None
    """What the body asks for; None where it does not say, and is refused."""
    source: Source | None
    """The adapter that this means; None: the base."""


@dataclass(frozen=True)
class Standing:
    """What a replica is about just now."""

    replica: str
    alive: bool
    load: dict[str, int]
    resident: tuple[str, ...]
    """The adapters on its model, by their keys."""
    metrics: bytes
    """In Prometheus' text format."""


class LetIn(Caller):
    """Who sent a request; what it may was counted by the ingress."""

    def __init__(self, sent: Sent) -> None:
        super().__init__(Key(name=sent.caller))
        self.sent = sent


class _Chosen(Names):
    """The ingress has looked the name up."""

    def adapter(self, caller: Caller, model: str) -> str | None:
        """The key of the adapter. Errors: `UnknownAdapter` for a body that asks for another name
        than the ingress has read in it.
        """
        assert isinstance(caller, LetIn)
        if model != caller.sent.model:
            raise self.unknown(model, [])
        return None if caller.sent.source is None else caller.sent.source.key


class Held:
    """An adapter that a replica can be asked for, until this is dropped."""

    def __init__(self, replica: Replica, key: str) -> None:
        self._replica, self._key = replica, key

    def __del__(self) -> None:
        self._replica.forget(self._key)


class Replica:
    """An engine that answers an ingress; `close` ends it.

    `bring` is awaited before an adapter is asked for, and makes sure that it is known here: `have`
    in a thread, unless somebody else keeps the account of who has what (Ray's multiplexing).
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Engine],
        base: str,
        most: Most,
        bring: Callable[[Source], Awaitable[Any]] | None = None,
    ) -> None:
        self.name = name
        self.engine = make().__enter__()
        self._counted = Metrics(self.engine)
        self._bring = bring if bring is not None else self._have
        self._lock = threading.Lock()
        names = _Chosen(self.engine.adapters, base)
        self._app = unguarded(self.engine, names, most, self._counted)

    # --- requests, in the loop

    async def answer(self, sent: Sent) -> AsyncGenerator[Message, None]:
        """The messages of the response (ASGI's) as they come; whoever closes this cancels."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        working = asyncio.ensure_future(self._respond(sent, messages))
        try:
            while (message := await messages.get()) is not None:
                yield message
            await working  # and what it failed with
        finally:
            working.cancel()

    async def _respond(self, sent: Sent, messages: asyncio.Queue[Message | None]) -> None:
        body = [{"type": "http.request", "body": sent.body, "more_body": False}]

        async def receive() -> Message:
            if body:
                return body.pop()
            await asyncio.Event().wait()  # who leaves closes `answer`
            raise AssertionError

        try:
            await self._call(sent, receive, messages.put)
        finally:
            messages.put_nowait(None)

    async def _call(self, sent: Sent, receive: Receive, send: Send) -> None:
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": sent.path,
            "root_path": "",
            "query_string": b"",
            "headers": [],
        }
        sent_by(scope, LetIn(sent))
        try:
            if sent.source is not None:
                await self._bring(sent.source)
        except SidepathError as error:
            await refusal(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _have(self, source: Source) -> None:
        await asyncio.to_thread(self.have, source)

    # --- adapters, in any thread

    def have(self, source: Source) -> str | None:
        """Know an adapter, if it is not known: its weights are read when it is asked for. Returns
        their digest, if the folder says it. Errors: those of `Adapters.register`; `StoreError`
        where the folder holds other weights than were loaded from it.
        """
        adapters = self.engine.adapters
        with self._lock:
            there = [version for version in adapters.versions() if version.name == source.key]
            if there:
                return there[0].digest
            version = adapters.register(
                source.key, source.place, allow_other_base=source.allow_other_base
            )
            if source.digest and version.digest and source.digest != version.digest:
                adapters.unload(source.key)
                raise StoreError(
                    "the folder holds another adapter than was loaded from it",
                    where=source.place,
                    found=version.digest,
                    expected=source.digest,
                    hint="load it anew under its name",
                )
            version.digest = version.digest or source.digest
            return version.digest

    def have_all(self, sources: list[Source]) -> list[str | SidepathError | None]:
        """The same of many: of each its digest, or its error."""
        found: list[str | SidepathError | None] = []
        for source in sources:
            try:
                found.append(self.have(source))
            except SidepathError as error:
                found.append(error)
        return found

    def load(self, source: Source) -> str | None:
        """Read an adapter and check it whole; it is ready to answer then. Returns its digest.

        Errors: those of `Adapters.load`.
        """
        with self._lock:
            return self.engine.adapters.load(
                source.key, source.place, allow_other_base=source.allow_other_base
            ).digest

    def forget(self, key: str) -> None:
        """Know an adapter no more: what it answers is answered to its end."""
        with suppress(UnknownAdapter):
            self.engine.adapters.unload(key)

    # --- itself

    def standing(self) -> Standing:
        """How it stands just now."""
        resident = [version.name for version in self.engine.adapters.tiers.resident()]
        return Standing(
            self.name,
            self.engine.alive and not self.engine.closed,
            load_of(self.engine),
            tuple(sorted(resident)),
            self._counted.text(),
        )

    def check(self) -> None:
        """Errors: `ServeError` once its engine has ended: it is to be started anew."""
        if not self.engine.alive:
            raise ServeError("the engine of a replica has ended")

    def close(self) -> None:
        """End it; what it answers is cancelled."""
        self.engine.close()


def share_of_cores(count: int, cores: int) -> None:
    """Let this process compute with its share of the cores."""
    torch.set_num_threads(max(1, cores // count))
