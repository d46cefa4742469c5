"""Answers of a given form: whatever the model would rather say, they are of the form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient
from transformers import AutoTokenizer

import sidepath
from sidepath.errors import RequestRefused, ServeError
from sidepath.serve.engine import Engine
from sidepath.serve.forms import asked_form, form_of
from sidepath.serve.http import application
from sidepath.serve.requests import Request
from sidepath.serve.sampling import Sampling
from sidepath.serve.scheduler import Limits
from tests.serve.kit import embedded

LIMITS = Limits(rows=4, slots=2, context=128, step_tokens=64)
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 30},
        "tame": {"type": "boolean"},
    },
    "required": ["kind", "age", "tame"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(sidepath.embedded_base())


@pytest.fixture(scope="module")
def engine(tokenizer: Any) -> Iterator[Engine]:
    with Engine(embedded(), tokenizer, LIMITS) as engine:
        yield engine


def fits(text: str) -> bool:
    found = json.loads(text)
    return (
        set(found) == {"kind", "age", "tame"}
        and found["kind"] in ("cat", "dog")
        and type(found["age"]) is int
        and 0 <= found["age"] <= 30
        and type(found["tame"]) is bool
    )


def test_answers_are_of_the_schema_greedy_and_drawn(engine: Engine, tokenizer: Any) -> None:
    form, prompt = (
        form_of(tokenizer, SCHEMA),
        tuple(tokenizer("The capital of France")["input_ids"]),
    )
    drawn = [Sampling(temperature=2.0, seed=seed) for seed in range(3)]
    handles = [
        engine.submit(Request(prompt, None, 60, sampling, form=form))
        for sampling in (Sampling(logprobs=2), Sampling(repetition_penalty=3.0), *drawn)
    ]
    free = engine.submit(Request(prompt, None, 8))
    answers = [handle.result() for handle in handles]
    assert all(answer.finish == "stop" and fits(answer.text) for answer in answers)
    assert len({answer.text for answer in answers}) > 1
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(free.result().text)
    first = answers[0].chosen[0]
    assert first.token not in [token for token, _ in first.likeliest], "as the model gave it"


def test_a_form_that_is_left_ends_its_own_request(engine: Engine, tokenizer: Any) -> None:
    progress = form_of(tokenizer, SCHEMA).begin()
    with pytest.raises(ServeError, match="the form cannot be followed"):
        progress.take(tokenizer.convert_tokens_to_ids(tokenizer.tokenize("x")[-1]))


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"type": "xml"}, "cannot be read"),
        ({"type": "json_schema"}, "cannot be read"),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, "cannot be read"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "odd"}}}, "schema"),
    ],
)
def test_what_cannot_be_followed_is_refused(tokenizer: Any, asked: Any, says: str) -> None:
    with pytest.raises(RequestRefused, match=says):
        asked_form(asked, tokenizer)


def test_without_the_library_it_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked_form({"type": "text"}, tokenizer) is None
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(RequestRefused, match="needs llguidance"):
        asked_form({"type": "json_object"}, tokenizer)


def test_the_routes_take_response_format(engine: Engine) -> None:
    with TestClient(application(engine, "base"), base_url="http://127.0.0.1") as client:
        body = {"model": "base", "prompt": "A pet:", "max_tokens": 60, "n": 2, "seed": 4}
        asked = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA}}
        reply = client.post("/v1/completions", json=body | {"response_format": asked}).json()
        assert all(fits(choice["text"]) for choice in reply["choices"])
        bad = client.post("/v1/completions", json=body | {"response_format": {"type": "odd"}})
        assert (bad.status_code, "response_format" in bad.text) == (400, True)
        short = body | {"max_tokens": 3, "response_format": {"type": "json_object"}}
        cut = client.post("/v1/completions", json=short).json()["choices"][0]
        assert (cut["finish_reason"], cut["text"][0]) == ("length", "{")
