"""Callers of the soak: those that ask, those that go away, those that send nonsense, and operators
that load, reload and unload.
"""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any

from benchmarks.soak_bad import bad_requests
from benchmarks.soak_checks import Answer, Checks
from benchmarks.soak_library import BASE, Question

HOST, PATIENCE = "127.0.0.1", 120.0
_COMPLETIONS = {True: "/v1/chat/completions", False: "/v1/completions"}

_LOOKS = ("/v1/models", "/v1/library", "/v1/load", "/metrics", "/", "/readyz")


@dataclass(frozen=True)
class Place:
    """The server under test, and the keys to it."""

    port: int
    operator: str
    tenant: str


IDLE = 2.0
"""Seconds after which a connection is not used again: the server closes those that idle for five,
and a client learns of it when it writes."""


class Caller:
    """One client: a connection that it uses again, as long as nothing ends it."""

    def __init__(self, place: Place, key: str) -> None:
        self.place, self._key = place, key
        self._connection: HTTPConnection | None = None
        self._used = 0.0

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> HTTPResponse:
        """One request; the reply's body is not read yet."""
        if time.monotonic() - self._used > IDLE:
            self.close()
        if self._connection is None:
            self._connection = HTTPConnection(HOST, self.place.port, timeout=PATIENCE)
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        named = {"Authorization": f"Bearer {self._key}", **headers}
        try:
            self._connection.request(method, path, raw, named)
            reply = self._connection.getresponse()
            self._used = time.monotonic()
            return reply
        except (OSError, HTTPException):
            self.close()
            raise

    def document(self, method: str, path: str, body: Any = None) -> tuple[int, Any, Any]:
        """Status, headers, and the JSON or text of a reply."""
        reply = self.send(method, path, body)
        raw = reply.read()
        kind = reply.headers.get("content-type", "")
        return reply.status, reply.headers, json.loads(raw) if "json" in kind else raw.decode()

    def close(self, *, at_once: bool = False) -> None:
        """Close the connection; `at_once` by a reset."""
        connection, self._connection = self._connection, None
        if connection is not None:
            if at_once and connection.sock is not None:
                linger = struct.pack("ii", 1, 0)
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            connection.close()


class Asker(threading.Thread):
    """Asks until `ended`, whole and streamed; goes away now and then; sends nonsense too."""

    def __init__(self, place: Place, checks: Checks, number: int, ended: threading.Event) -> None:
        super().__init__(name=f"asker-{number}", daemon=True)
        self._checks, self._ended, self._rng = checks, ended, random.Random(number)
        self._place, self._caller = place, Caller(place, place.tenant)
        self._bad = bad_requests(checks.library)
        library = checks.library
        self._questions = {name: library.questions(name) for name in (BASE, *library.names)}

    def run(self) -> None:
        kinds: list[tuple[int, Callable[[], None]]] = [
            (42, self._whole),
            (24, self._streamed),
            (12, self._leaves_a_stream),
            (6, self._leaves_before),
            (13, self._nonsense),
            (3, self._looks),
        ]
        weights, works = zip(*kinds, strict=True)
        while not self._ended.is_set():
            (work,) = self._rng.choices(works, weights)
            try:
                work()
            except (OSError, HTTPException) as error:
                self._caller.close()
                self._checks.fault("connection", f"{work.__name__}: {error!r}")
                time.sleep(0.2)
            if self._rng.random() < 0.2:
                self._caller.close()
        self._caller.close()

    def _question(self) -> tuple[str, Question]:
        names = [name for name, asked in self._questions.items() if asked]
        name = self._rng.choices(names, [1 / (1 + at) for at in range(len(names))])[0]
        return name, self._rng.choice(self._questions[name])

    def _body(self, name: str, question: Question, **more: Any) -> tuple[str, dict[str, Any]]:
        body = question.body(name, self._checks.library.new)
        return _COMPLETIONS[question.chat], {**body, **more}

    def _whole(self) -> None:
        name, question = self._question()
        before = self._checks.standing(name)
        path, body = self._body(name, question, n=self._rng.choice((1, 1, 1, 2)))
        status, headers, said = self._caller.document("POST", path, body)
        if status == 404:
            self._checks.missing(name, before)
        elif status != 200:
            self._checks.reply_failed(name, status, headers, str(said))
        else:
            self._checks.count("requests, whole")
            for choice in said["choices"]:
                text = choice["message"]["content"] if question.chat else choice["text"]
                answer = Answer(name, question, choice["generation"], text, whole=True)
                self._checks.answered(answer, before)

    def _streamed(self, most: int | None = None) -> None:
        """A stream, of which `most` events are read before the caller goes away."""
        name, question = self._question()
        before = self._checks.standing(name)
        path, body = self._body(name, question, stream=True)
        reply = self._caller.send("POST", path, body)
        if reply.status != 200:
            raw = reply.read().decode()
            if reply.status == 404:
                self._checks.missing(name, before)
            else:
                self._checks.reply_failed(name, reply.status, reply.headers, raw)
            return
        text, generations, ended = self._read(reply, most)
        self._checks.count("requests, streamed" if most is None else "requests, left in a stream")
        if len(generations) > 1:
            self._checks.fault("mixed versions", f"{name}: {generations}")
        for generation in generations:
            self._checks.answered(Answer(name, question, generation, text, ended), before)

    def _read(self, reply: HTTPResponse, most: int | None) -> tuple[str, set[int | None], bool]:
        text, generations, ended, seen = "", set(), False, 0
        while most is None or seen < most:
            line = reply.readline()
            if not line:
                break
            if not line.startswith(b"data: "):
                continue
            seen += 1
            if line == b"data: [DONE]\n":
                continue
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                self._checks.fault("crash or 5xx", f"in a stream: {event}")
                self._caller.close()
                return text, set(), False
            choice = event["choices"][0]
            text += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            generations.add(choice["generation"])
            ended = choice["finish_reason"] is not None
        if most is not None:
            reply.close()
            self._caller.close(at_once=self._rng.random() < 0.5)
        elif not ended:
            self._checks.fault("connection", "a stream ended before its answer")
        return text, generations, ended

    def _leaves_a_stream(self) -> None:
        self._streamed(self._rng.randint(1, max(1, self._checks.library.new // 2)))

    def _leaves_before(self) -> None:
        """Ask, and go away without reading anything."""
        self._caller.close()  # a connection that idles is closed by the server, as it should be
        path, body = self._body(*self._question(), stream=self._rng.random() < 0.5, n=2)
        raw = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer "
            f"{self._place.tenant}\r\ncontent-length: {len(raw)}\r\n\r\n"
        )
        with socket.create_connection((HOST, self._place.port), timeout=PATIENCE) as sock:
            sock.sendall(head.encode() + raw[: self._rng.choice((len(raw), len(raw) // 2))])
            time.sleep(self._rng.random() * 0.3)
        self._checks.count("requests, left before an answer")

    def _nonsense(self) -> None:
        self._caller.close()
        bad = self._rng.choice(self._bad)
        if bad.raw is not None:
            sock = socket.create_connection((HOST, self._place.port), timeout=PATIENCE)
            with sock, suppress(OSError):  # it may be turned away in the middle of it
                sock.sendall(bad.raw)
                sock.recv(64)
        else:
            keys = {"tenant": self._place.tenant, "operator": self._place.operator}
            caller = Caller(self._place, keys.get(bad.key, bad.key))
            reply = caller.send(bad.method, bad.path, bad.body, **bad.headers)
            text = reply.read().decode()
            caller.close()
            if reply.status not in bad.expected:
                self._checks.reply_failed(bad.what, reply.status, reply.headers, text[:300])
        self._checks.count("requests, bad")

    def _looks(self) -> None:
        path = self._rng.choice(
            ("/v1/models", "/v1/library", "/v1/load", "/metrics", "/", "/readyz")
        )
        status, headers, said = self._caller.document("GET", path)
        if status != 200:
            self._checks.reply_failed(path, status, headers, str(said)[:300])
        self._checks.count("requests, looks")


class Operator(threading.Thread):
    """Reloads, unloads and loads names, each of them alone at a time, until `ended`."""

    def __init__(
        self, place: Place, checks: Checks, names: list[str], ended: threading.Event, pause: float
    ) -> None:
        super().__init__(name=f"operator-{names[0]}", daemon=True)
        self._checks, self._names, self._ended, self._pause = checks, names, ended, pause
        self._caller, self._rng = Caller(place, place.operator), random.Random(names[0])

    def run(self) -> None:
        works = (
            self._replace,
            self._replace,
            self._replace,
            self._gone_for_a_while,
            self._outdated,
        )
        while not self._ended.is_set():
            try:
                self._rng.choice(works)(self._rng.choice(self._names))
            except (OSError, HTTPException) as error:
                self._checks.fault("connection", f"operator: {error!r}")
            self._ended.wait(self._rng.random() * self._pause)
        self._caller.close()

    def _post(self, verb: str, name: str, **more: Any) -> tuple[int, Any]:
        """Status and document; what was refused for want of memory is asked again."""
        while True:
            path, body = f"/v1/{verb}_lora_adapter", {"lora_name": name, **more}
            status, headers, said = self._caller.document("POST", path, body)
            if status != 503:
                return status, said
            self._checks.reply_failed(f"{verb} {name}", status, headers, str(said))
            self._ended.wait(1.0)
            if self._ended.is_set():
                return status, said

    def _load(self, name: str, **more: Any) -> None:
        folder = f"{name}-{self._rng.randrange(self._checks.library.versions)}"
        status, said = self._post("load", name, lora_path=folder, **more)
        if status == 200:
            self._checks.loaded(name, said["generation"], folder)
        elif status != 503:
            self._checks.fault("refused", f"load {folder}: {status} {said}")

    def _replace(self, name: str) -> None:
        more: dict[str, Any] = {"load_inplace": True}
        if self._rng.random() < 0.5:
            more["generation"] = self._checks.standing(name).generation
        self._load(name, **more)
        self._checks.count("swaps")

    def _gone_for_a_while(self, name: str) -> None:
        self._checks.stands(name, "changing")
        status, said = self._post("unload", name)
        if status not in (200, 202):
            self._checks.fault("refused", f"unload {name}: {status} {said}")
        self._checks.stands(name, "gone")
        self._checks.count("unloads", *(["unloads that still drained"] if status == 202 else []))
        self._ended.wait(self._rng.random() * self._pause)
        self._checks.stands(name, "changing")
        self._load(name, generation=0)
        self._checks.count("loads")

    def _outdated(self, name: str) -> None:
        """Of a generation that is not there any more: nothing may change."""
        wrong = self._checks.standing(name).generation - 1
        more = {"lora_path": f"{name}-0", "load_inplace": True, "generation": wrong}
        for verb, body in (("load", more), ("unload", {"generation": wrong})):
            status, said = self._post(verb, name, **body)
            if status != 409:
                self._checks.fault("refused", f"outdated {verb} of {name}: {status} {said}")
        self._checks.count("outdated changes refused")
