"""Ask a running server, with the standard library alone.

sidepath serve --adapters adapters --port 8000
python examples/client.py http://127.0.0.1:8000/v1 mine "How many cities"
"""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any


def models(url: str) -> list[str]:
    """What may be asked: the base, and every adapter."""
    with urllib.request.urlopen(f"{url}/models", timeout=10) as answer:
        return [model["id"] for model in json.load(answer)["data"]]


def complete(url: str, model: str, prompt: str, **more: Any) -> str:
    """The whole answer. Errors: `SystemExit` with what the server said."""
    with _asked(url, {"model": model, "prompt": prompt, **more}) as answer:
        text: str = json.load(answer)["choices"][0]["text"]
        return text


def pieces(url: str, model: str, prompt: str, **more: Any) -> Iterator[str]:
    """The answer as it comes, piece by piece (server-sent events)."""
    with _asked(url, {"model": model, "prompt": prompt, "stream": True, **more}) as answer:
        for line in answer:
            data = line.decode().removeprefix("data: ").strip()
            if data and data != "[DONE]":
                yield json.loads(data)["choices"][0]["text"]


def _asked(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        return urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        with error:
            told = json.load(error)["error"]["message"]
        raise SystemExit(f"{error.code}: {told}") from error


def main(url: str, model: str, prompt: str) -> None:
    """Say who is there, then ask twice: at once, and piece by piece."""
    print("served:", ", ".join(models(url)))
    settings = {"max_tokens": 12, "temperature": 0}
    print(prompt + complete(url, model, prompt, **settings))
    print(prompt, end="")
    for piece in pieces(url, model, prompt, **settings):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
