"""The routes, as clients meet them."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from transformers import AutoTokenizer

import sidepath
from sidepath.serve.engine import Engine
from sidepath.serve.http import application
from sidepath.serve.scheduler import Limits
from tests.serve.kit import Alone, embedded, save_adapters
from tests.serve.sockets import wait_until

LIMITS = Limits(rows=4, slots=2, context=128, step_tokens=64)
PROMPT = "The capital of France"
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_adapters(embedded, tmp_path_factory.mktemp("http"), 2)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(sidepath.embedded_base())
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def engine(folders: list[Path], tokenizer: Any) -> Iterator[Engine]:
    with Engine(embedded(), tokenizer, LIMITS) as engine:
        for number, folder in enumerate(folders):
            engine.adapters.load(f"adapter-{number}", folder)
        yield engine


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    with TestClient(application(engine, "base"), base_url="http://127.0.0.1") as client:
        yield client


@pytest.fixture(scope="module")
def expected(folders: list[Path], tokenizer: Any) -> dict[str, tuple[str, int]]:
    """Text and number of tokens of each model's greedy answer of 8 tokens, by `generate`."""
    alone = Alone(embedded, folders)
    prompt = tuple(tokenizer(PROMPT)["input_ids"])
    found = {}
    for name, number in (("base", None), ("adapter-0", 0), ("adapter-1", 1)):
        tokens = alone.tokens(number, prompt, 8)
        whole = tokenizer.decode([*prompt, *tokens], skip_special_tokens=True)
        before = tokenizer.decode(prompt, skip_special_tokens=True)
        found[name] = whole[len(before) :], len(tokens)
    assert len({text for text, _ in found.values()}) == 3
    return found


def body(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0} | more


def events(text: str) -> list[Any]:
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.mark.parametrize("model", ["base", "adapter-0", "adapter-1"])
def test_each_model_answers_for_itself(
    client: TestClient, expected: dict[str, tuple[str, int]], model: str, tokenizer: Any
) -> None:
    text, count = expected[model]
    reply = client.post("/v1/completions", json=body(model))
    assert reply.status_code == 200
    document = reply.json()
    assert document["model"] == model
    assert document["object"] == "text_completion"
    assert document["choices"][0]["text"].rstrip("\ufffd") == text.rstrip("\ufffd")
    assert document["choices"][0]["finish_reason"] in ("stop", "length")
    prompt = len(tokenizer(PROMPT)["input_ids"])
    assert document["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": count,
        "total_tokens": prompt + count,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    streamed = client.post(
        "/v1/completions", json=body(model, stream=True, stream_options={"include_usage": True})
    )
    assert streamed.headers["content-type"].startswith("text/event-stream")
    pieces = events(streamed.text)
    assert pieces[-1]["choices"] == []
    assert pieces[-1]["usage"] == document["usage"]
    said = "".join(piece["choices"][0]["text"] for piece in pieces[:-1])
    assert said == document["choices"][0]["text"]


def test_a_chat_whole_and_streamed(client: TestClient) -> None:
    asked = {
        "model": "adapter-1",
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 6,
        "temperature": 0.8,
        "seed": 5,
        "n": 2,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.post("/v1/chat/completions", json=asked).json()
    assert whole["object"] == "chat.completion"
    assert [choice["index"] for choice in whole["choices"]] == [0, 1]
    pieces = events(client.post("/v1/chat/completions", json={**asked, "stream": True}).text)
    assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}
    for choice in whole["choices"]:
        own = [p["choices"][0] for p in pieces if p["choices"][0]["index"] == choice["index"]]
        assert own[0]["delta"]["role"] == "assistant"
        said = "".join(each["delta"].get("content", "") for each in own)
        assert choice["message"] == {"role": "assistant", "content": said}
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        assert len(choice["logprobs"]["content"]) == len(own)
        for entry in choice["logprobs"]["content"]:
            assert len(entry["top_logprobs"]) == 2
            assert entry["logprob"] <= entry["top_logprobs"][0]["logprob"]


def test_a_stop_string_is_left_out(
    client: TestClient, expected: dict[str, tuple[str, int]]
) -> None:
    text, _ = expected["base"]
    middle = text[len(text) // 2 : len(text) // 2 + 2]
    choice = client.post("/v1/completions", json=body("base", stop=[middle])).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == text[: text.index(middle)]


def test_a_reply_says_what_was_cached_and_which_load_answered(client: TestClient) -> None:
    """Of two prompts, one of which begins like one before, each answered twice."""
    known, new = [7] * 40, [9] * 40
    generations = {m["id"]: m.get("generation") for m in client.get("/v1/models").json()["data"]}
    for model in ("base", "adapter-1"):
        client.post("/v1/completions", json=body(model, prompt=known))
        asked = body(model, prompt=[[*known, 8], new], n=2)
        reply = client.post("/v1/completions", json=asked).json()
        assert [each["generation"] for each in reply["choices"]] == [generations[model]] * 4
        assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": 40}
        more = {"stream": True, "stream_options": {"include_usage": True}}
        pieces = events(client.post("/v1/completions", json={**asked, **more}).text)
        assert {p["choices"][0]["generation"] for p in pieces[:-1]} == {generations[model]}
        assert pieces[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 40 + 39}


def test_the_models(client: TestClient) -> None:
    found = client.get("/v1/models").json()
    assert found["object"] == "list"
    assert [(model["id"], model["parent"]) for model in found["data"]] == [
        ("base", None),
        ("adapter-0", "base"),
        ("adapter-1", "base"),
    ]


@pytest.mark.parametrize(
    ("sent", "status", "code", "said"),
    [
        (body("adaptor-0"), 404, "model_not_found", 'did you mean "adapter-0"'),
        (body("Base"), 404, "model_not_found", 'no model "Base" is served'),
        (body("base", temperature=-1), 400, None, "temperature is -1"),
        (body("base", prompt=[9999]), 400, None, "does not know"),
        (body("base", max_tokens=1000), 400, None, "at most 128 have room"),
        (body("base", surprise=1), 400, None, "surprise is not known"),
    ],
)
def test_what_callers_do_wrong_is_theirs(
    client: TestClient, sent: Any, status: int, code: str | None, said: str
) -> None:
    for stream in (False, True):
        reply = client.post("/v1/completions", json={**sent, "stream": stream})
        assert reply.status_code == status
        error = reply.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["code"] == code
        assert said in error["message"]


def test_bodies_that_are_no_bodies(client: TestClient) -> None:
    assert client.post("/v1/completions", content=b"{").status_code == 400
    long = client.post("/v1/completions", content=b" " * (4 * 2**20 + 1))
    assert (long.status_code, long.json()["error"]["code"]) == (413, "body_too_large")
    assert client.get("/v1/completions").status_code == 405
    assert client.get("/nowhere").status_code == 404


def test_other_hosts_names_are_refused(client: TestClient) -> None:
    reply = client.get("/v1/models", headers={"host": "evil.example"})
    assert reply.status_code == 400


def test_a_full_queue_is_503_with_retry_after(tokenizer: Any) -> None:
    engine = Engine(embedded(), tokenizer, Limits(rows=1, context=128, step_tokens=64, queue=1))
    with TestClient(application(engine, "base"), base_url="http://localhost") as client:
        reply = client.post("/v1/completions", json=body("base", n=2))  # nobody steps
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "1"
        assert reply.json()["error"]["code"] == "overloaded"
        assert client.get("/healthz").status_code == 503
        engine.step()
        assert engine.load == (0, 0, 0), "the answer that had begun was cancelled"


def test_health_and_metrics(client: TestClient, engine: Engine) -> None:
    client.post("/v1/completions", json=body("adapter-0"))
    assert client.get("/healthz").text == "ok"
    assert client.get("/readyz").text == "ready"
    wait_until(lambda: engine.load == (0, 0, 0))  # the last piece comes before its step is counted
    text = client.get("/metrics").text
    assert re.search(r"^sidepath_adapters 2\.0$", text, re.M)
    assert f"sidepath_steps_total {float(engine.steps)}" in text
    ended = re.findall(r'sidepath_requests_total\{finish="\w+",model="adapter-0"\} (\S+)', text)
    assert sum(map(float, ended)) >= 1
    assert re.search(r"^sidepath_first_token_seconds_count [1-9]", text, re.M)
    assert re.search(r"^sidepath_next_token_seconds_count [1-9]", text, re.M)


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_that_goes_away_frees_its_row(engine: Engine, stream: bool) -> None:
    before = engine.ended["cancelled"]
    sent = json.dumps(body("adapter-0", max_tokens=110, stream=stream)).encode()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
        "scheme": "http",
        "server": ("localhost", 80),
        "client": ("127.0.0.1", 1),
        "http_version": "1.1",
    }

    async def call() -> None:
        given = [{"type": "http.request", "body": sent, "more_body": False}]

        async def receive() -> Any:
            if given:
                return given.pop()
            while engine.load == (0, 0, 0):
                await asyncio.sleep(0.001)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            return None

        await application(engine, "base")(scope, receive, send)

    asyncio.run(call())
    until = time.monotonic() + 20
    while engine.load != (0, 0, 0) or engine.ended["cancelled"] == before:  # counted a bit later
        assert time.monotonic() < until
        time.sleep(0.001)
    assert engine.ended["cancelled"] == before + 1


@pytest.mark.parametrize("stream", [False, True])
def test_memory_that_does_not_suffice_is_503_in_a_stream_too(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def full(parts: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(engine._runner, "logits", full)
        reply = client.post("/v1/completions", json=body("base", stream=stream))
    assert reply.status_code == 503
    assert reply.headers["retry-after"] == "1"
    assert reply.json()["error"]["code"] == "overloaded"
    assert client.post("/v1/completions", json=body("base")).status_code == 200
