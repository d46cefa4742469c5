"""Loading and unloading over HTTP: who may, what may, and when it has changed."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from transformers import AutoTokenizer

import sidepath
from sidepath.serve.changing import Changing
from sidepath.serve.confined import Loading
from sidepath.serve.engine import Engine
from sidepath.serve.gate import Gate
from sidepath.serve.http import Terms, application
from sidepath.serve.keys import Key, Keys, digest_of
from sidepath.serve.scheduler import Limits
from tests.serve.kit import embedded, save_adapters
from tests.serve.sockets import wait_until

KEYS = Keys(
    [
        Key(name="operator", sha256=digest_of("operator"), admin=True),
        Key(name="tenant", sha256=digest_of("tenant"), models=("one",)),
    ]
)
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters; the second of another shape, and so of other words."""
    place = tmp_path_factory.mktemp("changing")
    for number, folder in enumerate(save_adapters(embedded, place / "made", 2)):
        shutil.copytree(folder, place / "root" / str(number))
    return place / "root"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    tokenizer: Any = AutoTokenizer.from_pretrained(sidepath.embedded_base())
    limits = Limits(rows=4, slots=2, context=256, step_tokens=64)
    with Engine(embedded(), tokenizer, limits) as engine:
        yield engine


def made(engine: Engine, root: Path | None, **more: Any) -> TestClient:
    loading = None if root is None else Loading(root)
    terms = Terms(Gate(KEYS), loading=loading, **more)
    return TestClient(application(engine, "base", terms), base_url="http://localhost")


@pytest.fixture
def client(engine: Engine, root: Path) -> Iterator[TestClient]:
    with made(engine, root) as client:
        yield client
    for version in engine.adapters.versions():
        engine.adapters.unload(version.name)


def post(client: TestClient, path: str, key: str = "operator", **body: Any) -> Any:
    return client.post(path, json=body, headers={"authorization": f"Bearer {key}"})


def load(client: TestClient, name: str, path: str, **more: Any) -> Any:
    return post(client, LOAD, lora_name=name, lora_path=path, **more)


def models(client: TestClient, key: str = "operator") -> dict[str, int | None]:
    found = client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).json()["data"]
    return {model["id"]: model.get("generation") for model in found}


def said(client: TestClient, model: str, key: str = "operator") -> Any:
    reply = post(
        client, "/v1/completions", key, model=model, prompt="One", max_tokens=6, temperature=0
    )
    return reply.json()["choices"][0]["text"] if reply.status_code == 200 else reply.status_code


def test_a_name_comes_changes_and_goes(client: TestClient) -> None:
    assert said(client, "one") == 404
    first = load(client, "one", "0")
    assert first.status_code == 200
    assert first.json()["message"] == "Success: LoRA adapter 'one' added successfully."
    generation = first.json()["generation"]
    assert models(client) == {"base": None, "one": generation}
    before = said(client, "one")
    assert before != said(client, "base")
    assert load(client, "one", "1").status_code == 409
    assert said(client, "one") == before
    second = load(client, "one", "1", load_inplace=True).json()
    assert second["generation"] > generation
    assert said(client, "one") not in (before, said(client, "base"))
    gone = post(client, UNLOAD, lora_name="one")
    assert (gone.status_code, gone.json()["gone"]) == (200, True)
    assert said(client, "one") == 404
    assert post(client, UNLOAD, lora_name="one").status_code == 404


def test_a_generation_that_is_not_there_any_more(client: TestClient) -> None:
    assert load(client, "one", "0", generation=1).status_code == 409
    old = load(client, "one", "0", generation=0).json()["generation"]
    assert load(client, "one", "0", generation=0, load_inplace=True).status_code == 409
    new = load(client, "one", "1", generation=old, load_inplace=True).json()["generation"]
    stale = load(client, "one", "0", generation=old, load_inplace=True)
    assert stale.status_code == 409
    assert stale.json()["error"]["code"] == "generation_changed"
    assert post(client, UNLOAD, lora_name="one", generation=old).status_code == 409
    assert models(client)["one"] == new
    assert post(client, UNLOAD, lora_name="one", generation=new).status_code == 200


def test_of_many_that_compare_and_swap_one_wins(client: TestClient) -> None:
    old = load(client, "one", "0").json()["generation"]

    def swap(number: int) -> int:
        path = str(number % 2)
        reply = load(client, "one", path, load_inplace=True, generation=old)
        return int(reply.status_code)

    with ThreadPoolExecutor(6) as several:
        statuses = sorted(several.map(swap, range(6)))
    assert statuses == [200] + [409] * 5


def test_only_admin_keys_and_only_where_it_is_on(
    client: TestClient, engine: Engine, root: Path
) -> None:
    for path in (LOAD, UNLOAD):
        for key, status in (("tenant", 403), ("nobody", 401)):
            reply = post(client, path, key, lora_name="one", lora_path="0")
            assert reply.status_code == status
    with made(engine, None) as closed:
        refused = load(closed, "one", "0")
        assert refused.status_code == 403
        assert "--allow-loading" in refused.json()["error"]["message"]
    terms = Terms(loading=Loading(root))
    with TestClient(application(engine, "base", terms), base_url="http://localhost") as keyless:
        assert load(keyless, "one", "0").status_code == 403
    assert models(client) == {"base": None}


def test_a_key_sees_and_asks_what_it_may(client: TestClient) -> None:
    load(client, "one", "0")
    load(client, "two", "1")
    assert set(models(client)) == {"base", "one", "two"}
    assert set(models(client, "tenant")) == {"one"}
    assert said(client, "one", "tenant") == said(client, "one")
    for model in ("two", "base"):
        reply = post(client, "/v1/completions", "tenant", model=model, prompt="One")
        missing = post(client, "/v1/completions", "tenant", model="twx", prompt="One")
        assert reply.status_code == missing.status_code == 404
        message = reply.json()["error"]["message"]
        assert message == missing.json()["error"]["message"].replace("twx", model)
    metrics = client.get("/metrics", headers={"authorization": "Bearer tenant"})
    assert metrics.status_code == 403
    assert client.get("/metrics", headers={"authorization": "Bearer operator"}).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"lora_name": "base", "lora_path": "0"}, 409, "what the base is called"),
        ({"lora_name": "a b", "lora_path": "0"}, 400, "a b"),
        ({"lora_name": "../x", "lora_path": "0"}, 400, "../x"),
        ({"lora_name": "x" * 65, "lora_path": "0"}, 400, "x"),
        ({"lora_name": "\ud800", "lora_path": "0"}, 400, "cannot name an adapter"),
        ({"lora_name": "one", "lora_path": ".."}, 400, "does not lead"),
        ({"lora_name": "one", "lora_path": "\ud800"}, 400, "does not lead"),
        ({"lora_name": "one", "lora_path": "none"}, 400, "no adapter folder"),
        ({"lora_name": "one"}, 400, "lora_path is missing"),
        ({"lora_name": 1, "lora_path": "0"}, 400, "lora_name = 1"),
        ({"lora_name": "one", "lora_path": "0", "load_inplace": 1}, 400, "load_inplace = 1"),
        ({"lora_name": "one", "lora_path": "0", "generation": "1"}, 400, "generation"),
        ({"lora_name": "one", "lora_path": "0", "lora_nmae": "x"}, 400, "did you mean"),
        ([], 400, "not a JSON object"),
        (b"{", 400, "not JSON"),
        (b'{"lora_name": "a", "lora_name": "b"}', 400, "duplicate keys"),
    ],
)
def test_bodies_that_change_nothing(client: TestClient, body: Any, status: int, words: str) -> None:
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = client.post(LOAD, content=sent, headers={"authorization": "Bearer operator"})
    assert reply.status_code == status
    assert words in reply.json()["error"]["message"]
    assert models(client) == {"base": None}


def test_an_unload_waits_for_those_that_are_answered(engine: Engine, root: Path) -> None:
    with made(engine, root, drain_seconds=0.05) as client:
        load(client, "one", "0")
        # Nobody steps meanwhile: the answer cannot end before the route says that it has not.
        with engine._errands.turn:
            asking = threading.Thread(target=said, args=(client, "one"))
            asking.start()
            (version,) = engine.adapters.versions()
            wait_until(lambda: version.answering == 1)
            reply = post(client, UNLOAD, lora_name="one")
            assert (reply.status_code, reply.json()["gone"]) == (202, False)
            assert said(client, "one") == 404
        asking.join()
        assert version.gone.wait(60)


def test_memory_that_runs_out_while_loading(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(engine.adapters, "load", full)
        reply = load(client, "one", "0")
    assert reply.status_code == 503
    assert reply.headers["retry-after"] == "1"
    assert load(client, "one", "0").status_code == 200


def test_one_change_of_a_name_at_a_time() -> None:
    async def go() -> None:
        changing = Changing(None, "base", None, None, 1.0)  # type: ignore[arg-type]
        within: list[str] = []
        most = 0

        async def change(name: str) -> None:
            nonlocal most
            async with changing._alone(name):
                within.append(name)
                assert within.count(name) == 1
                most = max(most, len(within))
                await asyncio.sleep(0)
                within.remove(name)

        await asyncio.gather(*(change(name) for name in "ababab"))
        assert most == 2
        assert changing._names == {}

    asyncio.run(go())
