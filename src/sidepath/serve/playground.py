"""The page at `/`, and what it shows: the adapters, and what the engine does just now (floor 5).

One file of the package, with its style and script inside: nothing is built, and nothing is fetched
but this server's own routes. A nonce of each answer's own lets these two run and nothing else.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path
from typing import Any

from starlette.requests import Request as Incoming
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from sidepath.errors import SidepathError
from sidepath.serve.gate import caller_of
from sidepath.serve.names import Named
from sidepath.serve.versions import Version
from sidepath.store.library import read_entry

PAGE = Path(__file__).with_name("playground.html")


Load = Callable[[], Awaitable[dict[str, int]]]
"""Tells how much there is to do just now: `Engine`'s numbers, or their sums over several."""


def routes(adapters: Named, base: str, load: Load, *, chat: bool) -> list[Route]:
    """`/` is open to whoever may reach the server; the others tell what is served. `chat`: whether
    the base's tokenizer has a chat template.
    """
    shown = _Shown(adapters, base, load, chat)
    return [
        Route("/", page),
        Route("/v1/library", shown.library),
        Route("/v1/load", shown.load),
    ]


async def page(incoming: Incoming) -> Response:
    """The playground."""
    nonce = secrets.token_urlsafe(16)
    own = f"'nonce-{nonce}'"
    policy = (
        f"default-src 'none'; style-src {own}; script-src {own}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
    return HTMLResponse(_text().replace("{nonce}", nonce), headers=headers)


@cache
def _text() -> str:
    return PAGE.read_text(encoding="utf-8")


class _Shown:
    """What the page reads. `entries` remembers what each version's folder said."""

    def __init__(self, adapters: Named, base: str, load: Load, chat: bool) -> None:
        self._adapters, self._base, self._load, self._chat = adapters, base, load, chat
        self._entries: dict[int, dict[str, Any]] = {}

    async def library(self, incoming: Incoming) -> Response:
        """The adapters that this caller may ask, with what their folders say of them."""
        caller, versions = caller_of(incoming), self._adapters.versions()
        data = await asyncio.to_thread(lambda: [self._entry(version) for version in versions])
        self._entries = {entry["generation"]: entry for entry in data}
        data = [entry for entry in data if caller.may_ask(entry["id"])]
        own = {"object": "list", "base": self._base, "chat": self._chat}
        return JSONResponse({**own, "data": data})

    def _entry(self, version: Version) -> dict[str, Any]:
        if version.generation in self._entries:
            return self._entries[version.generation]
        own = {"id": version.name, "generation": version.generation}
        try:
            said = read_entry(Path(version.source)).as_dict()
        except SidepathError:  # it was there when it was loaded, and is served from memory
            return own
        del said["name"]
        return said | own

    async def load(self, incoming: Incoming) -> Response:
        """Requests, rows and slots just now, and tokens so far."""
        return JSONResponse(await self._load())
