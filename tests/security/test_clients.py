"""The clients that people use, with a key: curl, and OpenAI's own."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import pytest
from openai import AuthenticationError, NotFoundError, OpenAI, PermissionDeniedError, RateLimitError

from tests.security.conftest import PROMPT, Server


def curl(server: Server, path: str, *more: str) -> tuple[int, str]:
    """Status and body."""
    program = shutil.which("curl")
    if program is None:
        pytest.skip("curl is not installed")
    url = f"http://127.0.0.1:{server.port}{path}"
    command = [program, "--silent", "--show-error", "--max-time", "60", "-w", "%{http_code}", url]
    ran = subprocess.run([*command, *more], capture_output=True, text=True, check=True)
    return int(ran.stdout[-3:]), ran.stdout[:-3]


def test_curl(server: Server) -> None:
    key = ("-H", f"Authorization: Bearer {server.tenant}")
    body = {"model": "tenant-model", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    code, said = curl(server, "/v1/completions", *key, "-d", json.dumps(body))
    text = json.loads(said)["choices"][0]["text"]
    assert (code, text) == (200, server.text("tenant-model"))
    streaming = ("-N", "-d", json.dumps({**body, "stream": True}))
    code, said = curl(server, "/v1/completions", *key, *streaming)
    lines = [line for line in said.split("\n\n") if line]
    assert (code, lines[-1]) == (200, "data: [DONE]")
    pieces = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == text
    assert curl(server, "/v1/completions", "-d", json.dumps(body))[0] == 401
    assert curl(server, "/v1/models", *key)[0] == 200
    large = ("-H", "Expect: 100-continue", "--data-binary", "x" * 100_000)
    assert curl(server, "/v1/completions", *key, *large)[0] == 400


def test_openais_client(server: Server) -> None:
    def client(key: str) -> OpenAI:
        url = f"http://127.0.0.1:{server.port}/v1"
        return OpenAI(base_url=url, api_key=key, max_retries=0)

    asked: Any = {"model": "tenant-model", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    with client(server.tenant) as tenant, client("wrong") as nobody:
        assert [model.id for model in tenant.models.list()] == ["tenant-model"]
        reply = tenant.completions.create(**asked)
        assert reply.choices[0].text == server.text("tenant-model")
        with pytest.raises(NotFoundError):
            tenant.completions.create(**{**asked, "model": "base"})
        with pytest.raises(RateLimitError) as often:
            tenant.completions.create(**asked, n=9)
        assert often.value.code == "rate_limit_exceeded"
        with pytest.raises(PermissionDeniedError):
            tenant.post("/load_lora_adapter", cast_to=object, body={"lora_name": "x"})
        # Wrong keys may have been many by now.
        with pytest.raises((AuthenticationError, RateLimitError)):
            nobody.models.list()
