"""How much of bodies is read at once, and how much one may ask for (floor 5; extra `serve`)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as Incoming

from sidepath.errors import Overloaded, RequestRefused, TooLarge
from sidepath.serve.protocol import Asked

MOST_BYTES = 4 * 2**20
"""Longest body."""
MOST_TOGETHER = 16 * MOST_BYTES
"""Bytes of all bodies that are being read at a time."""


class Intake:
    """Reads bodies. For the server's loop alone."""

    def __init__(self, most: int = MOST_BYTES, together: int = MOST_TOGETHER) -> None:
        self._most, self._together, self.held = most, together, 0

    @asynccontextmanager
    async def body(self, incoming: Incoming) -> AsyncIterator[bytes]:
        """The body of a request; its bytes count as held until the block ends.

        Errors: `TooLarge`, before anything is read where the head says so; `Overloaded`.
        """
        stated = incoming.headers.get("content-length", "0")
        self._refuse(int(stated) if stated.isdecimal() else 0)
        raw = bytearray()
        try:
            async for part in incoming.stream():
                raw += part
                self.held += len(part)
                self._refuse(len(raw))
            yield bytes(raw)
        finally:
            self.held -= len(raw)

    def _refuse(self, size: int) -> None:
        if size > self._most:
            raise TooLarge("the body is too long", expected=f"at most {self._most:,} bytes")
        if self.held > self._together:
            raise Overloaded("too many bodies are being read", hint="try again later")


@dataclass(frozen=True)
class Most:
    """The most that one body may ask for, beside what the engine's own limits say."""

    prompt_tokens: int | None = None
    """Tokens of one prompt; None: what the engine has room for."""
    new_tokens: int | None = None
    """Tokens of one answer; None: what the engine has room for."""
    characters: int | None = None
    """Characters of all prompts or messages together: more are not even made tokens of."""

    def check_text(self, body: Mapping[str, Any]) -> None:
        """Errors: `RequestRefused` for a body with longer texts, or with half of a character."""
        try:
            count = _characters(body.get("prompt")) + _characters(body.get("messages"))
        except UnicodeEncodeError as error:
            raise RequestRefused(
                "a text is not Unicode", found=ascii(error.object)[:200]
            ) from error
        if self.characters is not None and count > self.characters:
            raise RequestRefused(
                "the text is too long",
                found=f"{count:,} characters",
                expected=f"at most {self.characters:,}",
            )

    def check(self, asked: Asked) -> None:
        """Errors: `RequestRefused` that names every limit that is passed."""
        longest = max(len(request.prompt) for request in asked.requests)
        most = max(request.max_new_tokens for request in asked.requests)
        faults = []
        if self.prompt_tokens is not None and longest > self.prompt_tokens:
            faults.append(f"a prompt of {longest} tokens: at most {self.prompt_tokens} are taken")
        if self.new_tokens is not None and most > self.new_tokens:
            faults.append(f"answers of {most} tokens: at most {self.new_tokens} are given")
        if faults:
            raise RequestRefused("the body asks for too much", faults=faults)


def _characters(value: Any) -> int:
    """Characters of the texts in a value; empty ones, and its other entries, count as one.

    Errors: `UnicodeEncodeError` for half of a pair of surrogates, which JSON can say.
    """
    if isinstance(value, str):
        value.encode()
        return max(1, len(value))
    if isinstance(value, list):
        return sum(map(_characters, value))
    if isinstance(value, dict):
        return 1 + sum(map(_characters, value.values()))
    return 0 if value is None else 1


def longest_text(tokens: int, answers: int, tokenizer: Any) -> int | None:
    """Characters that so many prompts of so many tokens can have at most: each token as long as
    the vocabulary's longest. None without a tokenizer.
    """
    if tokenizer is None:
        return None
    return answers * tokens * max(map(len, tokenizer.get_vocab()), default=1)
