"""OpenAI's own Python client against the server, over a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from transformers import AutoTokenizer

import sidepath
from sidepath.serve.engine import Engine
from sidepath.serve.scheduler import Limits
from tests.serve.kit import embedded, save_adapters, served


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    folders = save_adapters(embedded, tmp_path_factory.mktemp("openai"), 1)
    tokenizer: Any = AutoTokenizer.from_pretrained(sidepath.embedded_base())
    limits = Limits(rows=4, slots=2, context=256, step_tokens=64)
    with Engine(embedded(), tokenizer, limits) as engine, served(engine) as address:
        engine.adapters.load("adapter-0", folders[0])
        with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            yield client


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", "adapter-0"]


def test_a_completion(client: OpenAI) -> None:
    asked: Any = {"model": "adapter-0", "prompt": "One", "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**asked, logprobs=2)
    assert whole.usage is not None
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.tokens or []) == whole.usage.completion_tokens
    pieces = list(client.completions.create(**asked, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    base = client.completions.create(**{**asked, "model": "base"})
    assert base.choices[0].text != whole.choices[0].text


def test_a_chat(client: OpenAI) -> None:
    asked: Any = {
        "model": "adapter-0",
        "messages": [{"role": "user", "content": "One"}],
        "max_completion_tokens": 6,
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 1,
    }
    whole = client.chat.completions.create(**asked)
    pieces = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    said = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert said == whole.choices[0].message.content
    assert pieces[-1].usage == whole.usage
    assert whole.choices[0].logprobs is not None


def test_errors(client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match='no model "other" is served') as missing:
        client.completions.create(model="other", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(BadRequestError, match="temperature is -1"):
        client.completions.create(model="base", prompt="x", temperature=-1)


def test_a_caller_that_leaves_a_stream_is_no_fault(client: OpenAI) -> None:
    stream = client.completions.create(model="base", prompt="One", max_tokens=200, stream=True)
    next(iter(stream))
    stream.close()
    assert client.completions.create(model="base", prompt="One", max_tokens=1).choices
