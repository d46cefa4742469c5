"""Bodies: what is understood, and what is refused with every field named."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sidepath
from sidepath.errors import RequestRefused
from sidepath.serve.protocol import parse
from sidepath.serve.sampling import Sampling


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(sidepath.embedded_base())


TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def asked(body: object, chat: bool = False) -> Any:
    return parse(json.dumps(body).encode(), chat, tokenizer())


def test_a_completion_with_everything() -> None:
    body = {
        "model": "m",
        "prompt": ["one two", "three"],
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "seed": 7,
        "stop": "x",
        "logprobs": 2,
        "n": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
        "user": "me",
        "presence_penalty": 0.0,
        "logit_bias": None,
    }
    found = asked(body)
    assert (found.model, found.stream, found.usage, found.chat) == ("m", True, True, False)
    prompts = [tuple(tokenizer()(text)["input_ids"]) for text in ("one two", "three")]
    assert [request.prompt for request in found.requests] == [prompts[0]] * 2 + [prompts[1]] * 2
    assert found.prompt_tokens == sum(map(len, prompts))
    first = found.requests[0]
    assert (first.max_new_tokens, first.stop, first.adapter) == (5, ("x",), None)
    assert first.sampling == Sampling(0.5, 3, 0.9, 0.1, 1.1, 7, 2)
    seeds = [request.sampling.seed for request in found.requests]
    assert len(set(seeds)) == 4
    assert seeds == [request.sampling.seed for request in asked(body).requests]


def test_prompts_of_tokens() -> None:
    for prompt, expected in (([3, 4], [(3, 4)]), ([[3, 4], [5]], [(3, 4), (5,)])):
        found = asked({"model": "m", "prompt": prompt})
        assert [request.prompt for request in found.requests] == expected


def test_a_chat_goes_through_the_template(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer(), "chat_template", TEMPLATE)
    messages = [{"role": "user", "content": "hello"}]
    body = {"model": "m", "messages": messages, "logprobs": True, "max_completion_tokens": 3}
    found = asked(body, chat=True)
    text = tokenizer()("user: hello\nassistant:", add_special_tokens=False)["input_ids"]
    assert found.requests[0].prompt == tuple(text)
    assert found.requests[0].sampling.logprobs == 0
    assert found.requests[0].max_new_tokens == 3
    monkeypatch.setattr(tokenizer(), "chat_template", "{{ raise_exception('no such role') }}")
    with pytest.raises(RequestRefused, match="no such role"):
        asked(body, chat=True)


def test_a_base_without_a_template_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer(), "chat_template", None)
    with pytest.raises(RequestRefused, match="/v1/completions"):
        asked({"model": "m", "messages": [{"role": "user", "content": "x"}]}, chat=True)


BAD: list[tuple[object, str]] = [
    ([], "not a JSON object"),
    ({}, "model is missing"),
    ({"model": "m"}, "prompt is missing"),
    ({"model": 3, "prompt": "x"}, "model must be a string"),
    ({"model": "m", "prompt": "x", "max_tokens": True}, "max_tokens must be a whole number"),
    ({"model": "m", "prompt": "x", "max_tokens": 1.5}, "max_tokens must be a whole number"),
    ({"model": "m", "prompt": "x", "temprature": 0}, "did you mean temperature"),
    ({"model": "m", "prompt": "x", "temperature": -1}, "temperature is -1"),
    ({"model": "m", "prompt": "x", "seed": -1}, "seed is -1"),
    ({"model": "m", "prompt": "x", "seed": 2**64}, "seed is 18446744073709551616"),
    ({"model": "m", "prompt": "x", "frequency_penalty": 0.5}, "frequency_penalty is not supported"),
    ({"model": "m", "prompt": "x", "echo": True}, "echo is not supported"),
    ({"model": "m", "prompt": "x", "n": 0}, "too many answers, or for none"),
    ({"model": "m", "prompt": ["x"] * 9, "n": 2}, "n = 2 for 9 prompts"),
    ({"model": "m", "prompt": [1, "x"]}, "prompt cannot be read"),
    ({"model": "m", "prompt": [1, True]}, "prompt cannot be read"),
    ({"model": "m", "prompt": {"a": 1}}, "prompt cannot be read"),
    ({"model": "m", "prompt": []}, "too many answers, or for none"),
    ({"model": "m", "prompt": "x", "stop": [1]}, "stop must be a string"),
    ({"model": "m", "prompt": "x", "logprobs": 21}, "logprobs is 21"),
    ({"model": "m", "prompt": "x", "logprobs": True}, "logprobs must be a whole number"),
]


@pytest.mark.parametrize(("body", "said"), BAD)
def test_bad_bodies(body: object, said: str) -> None:
    with pytest.raises(RequestRefused, match=said):
        asked(body)


def test_bad_chats_name_each_message() -> None:
    messages = [{"role": "user"}, "x", {"role": "user", "content": "x"}, {"content": 3}]
    with pytest.raises(RequestRefused) as error:
        asked({"model": "m", "messages": messages}, chat=True)
    assert [fault.split()[0] for fault in error.value.faults] == [
        "messages[0]",
        "messages[1]",
        "messages[3]",
    ]
    with pytest.raises(RequestRefused, match="there are none"):
        asked({"model": "m", "messages": []}, chat=True)


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
NAMES = (
    "model prompt messages max_tokens temperature top_p top_k min_p seed stop n stream logprobs"
    " stream_options echo tools nonsense"
)
names = st.sampled_from(NAMES.split())


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(names, values), st.booleans())
def test_any_body_is_understood_or_refused(body: dict[str, Any], chat: bool) -> None:
    try:
        found = asked(body, chat)
    except RequestRefused:
        return
    assert found.requests


@given(st.binary(max_size=40))
def test_any_bytes_are_understood_or_refused(raw: bytes) -> None:
    with pytest.raises(RequestRefused):
        parse(raw, False, tokenizer())


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(RequestRefused):
        parse(b"[" * 100_000, False, tokenizer())
