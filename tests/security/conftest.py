"""One server, as `sidepath serve --keys --allow-loading` makes it, on a real socket."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import sidepath
from sidepath.cli.gating import terms_of
from sidepath.cli.serve_run import ServeRun
from sidepath.serve.engine import Engine
from sidepath.serve.http import application
from sidepath.serve.keys import Key, add_key
from sidepath.serve.scheduler import Limits
from tests.serve.kit import embedded, save_adapters
from tests.serve.sockets import Said, ask, served

PROMPT = "One"


@dataclass(frozen=True)
class Server:
    """The server under attack."""

    port: int
    engine: Engine
    root: Path
    """Where it may load from: `0` and `1`, two adapters of different words."""
    operator: str
    """An admin key."""
    tenant: str
    """A key that may ask "tenant-model" alone."""
    keys: Path

    def post(self, path: str, key: str | None = None, **body: Any) -> Said:
        """A body of JSON, by the operator if nobody is named."""
        return ask(self.port, path, body, key=self.operator if key is None else key)

    def load(self, name: str, path: str, **more: Any) -> Said:
        """Ask for an adapter to be loaded."""
        return self.post("/v1/load_lora_adapter", lora_name=name, lora_path=path, **more)

    def unload(self, name: str) -> Said:
        """Ask for an adapter to be unloaded."""
        return self.post("/v1/unload_lora_adapter", lora_name=name)

    def complete(self, model: str, key: str | None = None, **more: Any) -> Said:
        """A greedy answer of a few tokens."""
        body = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0} | more
        return self.post("/v1/completions", key, model=model, **body)

    def text(self, model: str) -> str:
        """What a model says."""
        reply = self.complete(model)
        assert reply.status == 200, reply.text
        text: str = reply.document["choices"][0]["text"]
        return text

    def names(self) -> list[str]:
        """The adapters there are."""
        return [version.name for version in self.engine.adapters.versions()]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    place = tmp_path_factory.mktemp("security")
    folders = save_adapters(embedded, place / "made", 2)
    keys = place / "keys.json"
    operator = add_key(keys, Key(name="operator", admin=True))
    tenant = add_key(keys, Key(name="tenant", models=("tenant-model",), at_once=8))
    for number, folder in enumerate(folders):
        shutil.copytree(folder, place / "root" / str(number))
    settings: dict[str, Any] = {
        "keys": str(keys),
        "allow_loading": str(place / "root"),
        "max_rank": 16,
        "max_adapter_bytes": 2**20,
        "max_new_tokens": 200,
        "head_seconds": 1.5,
        "body_seconds": 1.5,
        "stall_seconds": 1.5,
    }
    tokenizer: Any = AutoTokenizer.from_pretrained(sidepath.embedded_base())
    limits = Limits(rows=4, slots=2, context=256, step_tokens=64)
    with Engine(embedded(), tokenizer, limits) as engine:
        engine.adapters.load("tenant-model", folders[0])
        made = application(engine, "base", terms_of(ServeRun(**settings)))
        with served(made, small=True, **settings) as port:
            yield Server(port, engine, place / "root", operator, tenant, keys)
