"""What no client should send, and the statuses that may answer it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.soak_library import Library

_ALL, _CHAT = "/v1/completions", "/v1/chat/completions"
_LOAD, _UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@dataclass(frozen=True)
class Bad:
    """One bad request, or the bytes of one."""

    what: str
    path: str = _ALL
    body: Any = None
    expected: tuple[int, ...] = (400,)
    method: str = "POST"
    key: str = "tenant"
    """`tenant`, `operator`, or a key that nobody was given."""
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bytes | None = None


def bad_requests(library: Library) -> list[Bad]:
    """Many kinds of them."""
    return [*_bodies(library.names[0]), *_fields(library.names[0]), *_changes(library), *_bytes()]


def _bodies(name: str) -> Iterator[Bad]:
    good = {"model": name, "prompt": "one"}
    yield Bad("unknown model", body={**good, "model": "nobody"}, expected=(404,))
    yield Bad("near name", body={**good, "model": f"{name} "}, expected=(404,))
    yield Bad("a folder's name", body={**good, "model": f"{name}-1"}, expected=(404,))
    yield Bad("no JSON", body=b"{nonsense")
    yield Bad("empty", body=b"")
    yield Bad("a list", body=b"[]")
    yield Bad("nested", body=b"[" * 100_000)
    yield Bad("no prompt", body={"model": name})
    yield Bad("no model", body={"prompt": "one"})
    yield Bad("too large", body=b" " * (4 * 2**20 + 1), expected=(413,))
    yield Bad("no messages", _CHAT, {"model": name, "messages": []})
    yield Bad("wrong messages", _CHAT, {"model": name, "messages": ["x"]})
    yield Bad("no such route", "/v1/nothing", {}, (404,))
    yield Bad("wrong method", body=None, expected=(405,), method="GET")
    yield Bad("no key", body=good, expected=(401, 429), key="")
    yield Bad("wrong key", body=good, expected=(401, 429), key="sp-guessed")
    yield Bad("other host", body=good, headers={"Host": "evil.example"})
    yield Bad("other origin", body=good, expected=(403,), headers={"Origin": "http://evil.example"})


def _fields(name: str) -> Iterator[Bad]:
    good = {"model": name, "prompt": "one"}
    for field_name, value in (
        ("max_tokens", 0),
        ("max_tokens", 10**30),
        ("max_tokens", "many"),
        ("temperature", -1),
        ("top_p", 7),
        ("top_k", -(10**30)),
        ("n", 0),
        ("n", 10**9),
        ("stop", ["x"] * 10_000),
        ("prompt", "one two three " * 400),
        ("prompt", [10**30]),
        ("prompt", [-1]),
        ("prompt", "\ud800"),
        ("prompt", []),
        ("seed", 10**30),
        ("logprobs", 10**9),
        ("tempreature", 0),
        ("response_format", {"type": "nothing"}),
    ):
        yield Bad(f"{field_name}={value!r:.20}", body={**good, field_name: value})


def _changes(library: Library) -> Iterator[Bad]:
    name = library.names[0]  # nobody reloads it: the operators leave the first names alone
    asked = {"lora_name": "intruder", "lora_path": f"{name}-0"}
    yield Bad("load without admin", _LOAD, asked, (403,))
    yield Bad("unload without admin", _UNLOAD, {"lora_name": name}, (403,))
    yield Bad("a taken name", _LOAD, {**asked, "lora_name": name}, (409,), key="operator")
    yield Bad("the base's name", _LOAD, {**asked, "lora_name": "base"}, (409,), key="operator")
    yield Bad("unload of nobody", _UNLOAD, {"lora_name": "nobody"}, (404,), key="operator")
    for path in ("../served/a0", "/etc", "", "nothing", *library.bad):
        body = {**asked, "lora_path": path}
        yield Bad(f"load of {path!r}", _LOAD, body, (400,), key="operator")


def _bytes() -> Iterator[Bad]:
    yield Bad("garbage", raw=bytes(range(256)) * 8)
    yield Bad("half a head", raw=b"POST /v1/completions HTTP/1.1\r\nhost: loc")
    yield Bad("a bomb of headers", raw=b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000 + b"\r\n")
    yield Bad("a long header", raw=b"GET / HTTP/1.1\r\nx: " + b"y" * 200_000 + b"\r\n\r\n")
