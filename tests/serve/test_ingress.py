"""The entrance to several replicas: who answers, what is sent again, and what holds at the gate."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sidepath.errors import StoreError, UnknownAdapter
from sidepath.serve.confined import Loading
from sidepath.serve.engine import Engine
from sidepath.serve.gate import Gate
from sidepath.serve.http import Terms
from sidepath.serve.ingress import ATTEMPTS, ingress
from sidepath.serve.keys import Key, Keys, digest_of
from sidepath.serve.scheduler import Limits
from sidepath.serve.shared import Shared, source_of
from tests.conftest import tiny_llama
from tests.serve import sockets
from tests.serve.kit import Alone, save_adapters
from tests.serve.nearby import Nearby, nearby
from tests.serve.sockets import Said, ask
from tests.tokens import byte_tokenizer

PROMPT = [5, 6, 7, 8]
KEYS = Keys(
    [
        Key(name="tenant", sha256=digest_of("t"), models=("adapter-0",), at_once=2),
        Key(name="operator", sha256=digest_of("o"), admin=True),
    ]
)


def make() -> Engine:
    limits = Limits(rows=4, slots=2, step_tokens=12, context=96, patience=3)
    return Engine(tiny_llama(), byte_tokenizer(), limits)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_adapters(tiny_llama, tmp_path_factory.mktemp("ingress"), 3)


@pytest.fixture(scope="module")
def alone(folders: list[Path]) -> Alone:
    return Alone(tiny_llama, folders)


@pytest.fixture(scope="module")
def two() -> Iterator[Nearby]:
    with nearby(2, make) as replicas:
        yield replicas


class Entrance:
    """A server of its own over replicas that several tests share."""

    def __init__(self, port: int, replicas: Nearby, shared: Shared) -> None:
        self.port, self.replicas, self.shared = port, replicas, shared

    def complete(self, model: Any, tokens: int = 6, key: str = "o", **more: Any) -> Said:
        body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, **more}
        return ask(self.port, "/v1/completions", body, key=key)

    def change(self, route: str, key: str = "o", **body: Any) -> Said:
        return ask(self.port, f"/v1/{route}_lora_adapter", body, key=key)

    def counted(self, name: str) -> dict[str, float]:
        text = ask(self.port, "/metrics", key="o").text
        lines = [line.rpartition(" ") for line in text.splitlines() if line.startswith(name)]
        return {line[0]: float(line[2]) for line in lines}


@contextmanager
def entered(replicas: Nearby, folders: list[Path], root: Path | None = None) -> Iterator[Entrance]:
    replicas.ends = lambda number, attempt: False
    replicas.asked.clear()
    shared = Shared(replicas)
    shared.register_all({each.name: each for each in folders[:2]}, allow_other_base=False)
    loading = None if root is None else Loading(root)
    terms = Terms(Gate(KEYS), loading=loading, drain_seconds=5.0)
    with sockets.served(ingress(replicas, shared, "base", terms, chat=False)) as port:
        yield Entrance(port, replicas, shared)


@pytest.fixture
def entrance(two: Nearby, folders: list[Path]) -> Iterator[Entrance]:
    with entered(two, folders, folders[0].parent) as found:
        yield found


def text_of(tokens: tuple[int, ...]) -> str:
    text: str = byte_tokenizer().decode(tokens, skip_special_tokens=True)
    return text


def test_each_name_is_answered_by_its_own(entrance: Entrance, alone: Alone) -> None:
    for model, number in (("base", None), ("adapter-0", 0), ("adapter-1", 1)):
        said = entrance.complete(model)
        assert said.status == 200
        assert said.document["model"] == model
        expected = alone.tokens(number, tuple(PROMPT), 6)
        assert said.document["choices"][0]["text"] == text_of(expected)


def test_what_is_no_name_is_never_the_base(entrance: Entrance) -> None:
    said = entrance.complete("adapter-7")
    assert (said.status, said.error["code"]) == (404, "model_not_found")
    assert entrance.replicas.asked == []
    # Without a name, or with something else in its place, a replica says all that is wrong.
    for model in (None, 3, ["base"]):
        said = entrance.complete(model, n="x")
        assert said.status == 400
        assert "n must be a whole number" in said.error["message"]
    assert ask(entrance.port, "/v1/completions", b"{", key="o").status == 400


def test_the_gate_holds_before_any_replica(entrance: Entrance) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter", "/metrics"):
        assert ask(entrance.port, path, {}).status == 401
    assert entrance.complete("adapter-1", key="t").status == 404, "not this key's"
    assert entrance.complete("adapter-0", key="t", n=3).status == 429, "two answers at once"
    assert ask(entrance.port, "/metrics", key="t").status == 403
    assert entrance.change("unload", key="t", lora_name="adapter-0").status == 403
    assert entrance.replicas.asked == []
    for _ in range(3):  # what was waited for counts no more once it has come
        assert entrance.complete("adapter-0", key="t", n=2).status == 200
    assert {sent.caller for _, sent in entrance.replicas.asked} == {"tenant"}
    other = {"Host": "elsewhere.example"}
    assert ask(entrance.port, "/healthz", headers=other).status == 400


def first_ends(at: int, number: int, attempt: int) -> bool:
    return attempt == 0 and number == at


def test_a_request_of_a_replica_that_ends_is_answered_by_another(
    entrance: Entrance, alone: Alone
) -> None:
    # Whole answers have two messages: the head and the body. Nothing is out before the body is.
    for lost_at in (0, 1):
        entrance.replicas.ends = partial(first_ends, lost_at)
        said = entrance.complete("adapter-0")
        assert said.status == 200
        text = text_of(alone.tokens(0, tuple(PROMPT), 6))
        assert said.document["choices"][0]["text"] == text
    entrance.replicas.ends = lambda number, attempt: attempt == 0 and number == 1
    assert entrance.complete("adapter-0", stream=True).text.endswith("data: [DONE]\n\n")
    assert entrance.counted("sidepath_retries_total") == {"sidepath_retries_total": 3.0}
    entrance.replicas.ends = lambda number, attempt: number == 2  # it was whole by then
    assert entrance.complete("adapter-0").status == 200


def test_a_request_that_ends_whoever_answers_it_ends_three(entrance: Entrance) -> None:
    entrance.replicas.ends = lambda number, attempt: True
    said = entrance.complete("adapter-0")
    assert (said.status, said.error["code"]) == (500, "replica_lost")
    assert len(entrance.replicas.asked) == ATTEMPTS
    (version,) = [each for each in entrance.shared.versions() if each.name == "adapter-0"]
    assert version.answering == 0


def test_a_stream_that_is_cut_says_so(entrance: Entrance) -> None:
    entrance.replicas.ends = lambda number, attempt: number == 3
    said = entrance.complete("adapter-0", stream=True)
    assert said.status == 200
    *words, last, done = said.text.strip().split("\n\n")
    assert len(words) == 2
    assert json.loads(last[6:])["error"]["code"] == "replica_lost"
    assert "the answer breaks off here" in last
    assert done == "data: [DONE]"
    assert len(entrance.replicas.asked) == 1, "nobody is answered twice"
    assert entrance.counted("sidepath_streams_cut_total") == {"sidepath_streams_cut_total": 1.0}


def test_a_load_is_there_for_all_and_an_unload_leaves_nothing(
    entrance: Entrance, alone: Alone
) -> None:
    assert entrance.change("load", lora_name="new", lora_path="../x").status == 400
    said = entrance.change("load", lora_name="new", lora_path="adapter-2")
    assert said.status == 200, said.text
    generation = said.document["generation"]
    (version,) = [each for each in entrance.shared.versions() if each.name == "new"]
    key = source_of(version).key
    for replica in entrance.replicas.replicas:
        assert key in [each.name for each in replica.engine.adapters.versions()]
    text = text_of(alone.tokens(2, tuple(PROMPT), 6))
    assert entrance.complete("new").document["choices"][0]["text"] == text
    assert entrance.change("load", lora_name="new", lora_path="adapter-0").status == 409
    stale = {"load_inplace": True, "generation": generation - 1}
    assert entrance.change("load", lora_name="new", lora_path="adapter-0", **stale).status == 409
    again = {"load_inplace": True, "generation": generation}
    said = entrance.change("load", lora_name="new", lora_path="adapter-0", **again)
    assert said.document["generation"] > generation
    text = text_of(alone.tokens(0, tuple(PROMPT), 6))
    assert entrance.complete("new").document["choices"][0]["text"] == text
    said = entrance.change("unload", lora_name="new")
    assert (said.status, said.document["gone"]) == (200, True)
    assert entrance.complete("new").status == 404
    for replica in entrance.replicas.replicas:
        assert key not in [each.name for each in replica.engine.adapters.versions()]


def test_a_replica_that_knows_nothing_learns_with_the_request(
    two: Nearby, folders: list[Path], alone: Alone
) -> None:
    """Started anew, it was told of no adapter; and answers by no other weights than were loaded."""
    with entered(two, folders) as entrance:
        for replica in two.replicas:
            for version in entrance.shared.versions():
                replica.forget(source_of(version).key)
        text = text_of(alone.tokens(1, tuple(PROMPT), 6))
        assert entrance.complete("adapter-1").document["choices"][0]["text"] == text
        (version,) = [each for each in entrance.shared.versions() if each.name == "adapter-0"]
        version.source = str(folders[1])
        said = entrance.complete("adapter-0")
        assert said.status == 500
        assert "holds another adapter" in said.error["message"]


def test_a_folder_that_fails_is_served_by_nobody(
    two: Nearby, folders: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text("{")
    shared = Shared(two)
    found = {"good": folders[0], "damaged": tmp_path, "bad name": folders[1]}
    with pytest.raises(StoreError, match="2 of 3 adapters cannot be served") as error:
        shared.register_all(found, allow_other_base=False)
    assert len(error.value.faults) == 2
    with pytest.raises(StoreError):
        shared.load("damaged", tmp_path)
    with pytest.raises(UnknownAdapter):
        shared.acquire("damaged")
    assert shared.versions() == []


def test_what_is_told_of_all(entrance: Entrance) -> None:
    assert entrance.complete("adapter-0").status == 200
    assert (ask(entrance.port, "/healthz").text, ask(entrance.port, "/readyz").text) == (
        "ok",
        "ready",
    )
    names = [each["id"] for each in ask(entrance.port, "/v1/models", key="o").document["data"]]
    assert names == ["base", "adapter-0", "adapter-1"]
    library = ask(entrance.port, "/v1/library", key="o").document
    assert (library["chat"], len(library["data"])) == (False, 2)
    assert ask(entrance.port, "/v1/load", key="o").document["rows"] == 8
    assert ask(entrance.port, "/openapi.json").document["openapi"].startswith("3.")
    assert ask(entrance.port, "/").status == 200
    assert entrance.counted("sidepath_replicas") == {"sidepath_replicas": 2.0}
    running = entrance.counted("sidepath_running")
    assert list(running) == [f'sidepath_running{{replica="r{number}"}}' for number in (0, 1)]
    assert entrance.counted('sidepath_requests_total{finish="length",model="adapter-0"')


def test_no_replica_no_readiness(folders: list[Path]) -> None:
    with entered(Nearby([]), []) as entrance:
        said = ask(entrance.port, "/readyz")
        assert (said.status, said.text) == (503, "no replica answers")
        assert ask(entrance.port, "/healthz").status == 200
        assert ask(entrance.port, "/v1/load", key="o").document == {}
