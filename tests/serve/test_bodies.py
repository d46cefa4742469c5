"""How much is read at once, and how much one body may ask for."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from typing import Any

import pytest
from starlette.requests import Request as Incoming

from sidepath.errors import Overloaded, RequestRefused, TooLarge
from sidepath.serve.bodies import Intake, Most, longest_text
from sidepath.serve.protocol import parse
from tests.tokens import byte_tokenizer


def incoming(parts: list[bytes], stated: str | None = None) -> tuple[Incoming, list[int]]:
    """A request whose body comes in these parts; and how many of them were read."""
    read: list[int] = []

    async def receive() -> Any:
        read.append(len(read))
        last = len(read) == len(parts)
        return {"type": "http.request", "body": parts[len(read) - 1], "more_body": not last}

    headers = [] if stated is None else [(b"content-length", stated.encode())]
    return Incoming({"type": "http", "method": "POST", "headers": headers}, receive), read


def test_bodies_up_to_the_limit() -> None:
    async def go() -> None:
        intake = Intake(most=10, together=25)
        request, _ = incoming([b"12345", b"67890"])
        async with intake.body(request) as raw:
            assert raw == b"1234567890"
            assert intake.held == 10
        assert intake.held == 0
        request, read = incoming([b"12345", b"678901", b"2"])
        with pytest.raises(TooLarge, match="at most 10 bytes"):
            await intake.body(request).__aenter__()
        assert read == [0, 1], "the rest is not read"
        request, read = incoming([b"x"], stated="11")
        with pytest.raises(TooLarge):
            await intake.body(request).__aenter__()
        assert read == [], "nothing is read where the head says enough"
        for odd in ("", "-5", "1e9", "x"):
            request, _ = incoming([b"abc"], stated=odd)
            async with intake.body(request) as raw:
                assert raw == b"abc"
        assert intake.held == 0

    asyncio.run(go())


def test_all_bodies_together() -> None:
    async def go() -> None:
        intake = Intake(most=10, together=25)
        async with AsyncExitStack() as held:
            for _ in range(2):
                await held.enter_async_context(intake.body(incoming([b"x" * 10])[0]))
            with pytest.raises(Overloaded):
                await intake.body(incoming([b"x" * 10])[0]).__aenter__()
            async with intake.body(incoming([b"x" * 5])[0]):
                assert intake.held == 25
        assert intake.held == 0

    asyncio.run(go())


def test_what_one_body_may_ask_for() -> None:
    tokenizer = byte_tokenizer()

    def asked(**body: Any) -> Any:
        most.check(parse(_json({"model": "m", **body}), False, tokenizer, most.check_text))

    most = Most(prompt_tokens=6, new_tokens=9, characters=20)
    asked(prompt="12345", max_tokens=9)
    with pytest.raises(RequestRefused) as error:
        asked(prompt=["1", "1234567"], max_tokens=10)
    assert len(error.value.faults) == 2
    with pytest.raises(RequestRefused, match="21 characters"):
        asked(prompt=["x" * 10, "y" * 11])
    with pytest.raises(RequestRefused, match="21 characters"):
        asked(prompt=[[3] * 21])
    body = {"model": "m", "messages": [{"role": "user", "content": "x" * 26}]}
    with pytest.raises(RequestRefused, match="31 characters"):
        parse(_json(body), True, tokenizer, most.check_text)
    Most().check_text({"prompt": "x" * 10_000})
    for half in ("a\ud800", ["\udfff"]):
        with pytest.raises(RequestRefused, match="a text is not Unicode"):
            asked(prompt=half)


def test_no_text_that_fits_is_too_long(tokenizer: Any) -> None:
    vocabulary = tokenizer.get_vocab()
    longest = max(vocabulary, key=len)
    most = longest_text(16, 2, tokenizer)
    assert most == 32 * len(longest)
    assert longest_text(16, 2, None) is None


def _json(body: Any) -> bytes:
    return json.dumps(body).encode()
