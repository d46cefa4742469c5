"""Many texts at a time, each by its own adapter: vectors and classes as of each alone."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient
from torch import Tensor

import sidepath
from sidepath import LoRA
from sidepath.errors import Overloaded, RequestRefused, ServeError, StoreError, UnknownAdapter
from sidepath.serve.encoder_http import application, softmax
from sidepath.serve.encoder_openapi import encoder_document
from sidepath.serve.encoders import Encoder, Room
from sidepath.serve.pooling import Pooling, pooling_of
from sidepath.serve.tiers import Memory
from tests.conftest import randomise, tiny_bert
from tests.serve.kit import Letters, tiny_encoder

TEXTS = [tuple(3 + (7 * n + row) % 60 for n in range(2 + 3 * row)) for row in range(6)]
NAMES = ("one", "two", "three")
LABELS = ["no", "yes"]


def labelled() -> Any:
    model: Any = tiny_bert()
    model.config.id2label = dict(enumerate(LABELS))
    return model


def save(make: Any, folder: Path, whole: tuple[str, ...] = ()) -> list[Path]:
    folders = []
    for number, name in enumerate(NAMES):
        model = make()
        if whole:
            model.config.id2label = dict(enumerate(f"{name}-{label}" for label in LABELS))
        targets = ("query", "value") if number else ("all-linear",)
        config = LoRA(r=2 + number, alpha=8, targets=targets, train_whole=whole)
        adapter = sidepath.inject(model, config, name=name)
        torch.manual_seed(50 + number)
        randomise(adapter.parameters(), std=0.3)
        folders.append(adapter.save(folder / name))
    return folders


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save(tiny_encoder, tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save(labelled, tmp_path_factory.mktemp("classes"), whole=("classifier",))


def alone(make: Any, folder: Path | None, tokens: tuple[int, ...]) -> Any:
    """What the model gives for one text with one adapter."""
    model = make()
    if folder is not None:
        sidepath.load(model, folder, name="one")
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens]))


def name_of(folder: Path | None) -> str | None:
    return None if folder is None else folder.name


def vector(folder: Path | None, tokens: tuple[int, ...]) -> Tensor:
    mean: Tensor = alone(tiny_encoder, folder, tokens).last_hidden_state[0].mean(dim=0)
    unit: Tensor = mean / mean.norm()
    return unit


def encoder_over(folders: list[Path], make: Any = tiny_encoder, **more: Any) -> Encoder:
    pooling = None if make is labelled else Pooling(normalised=True)
    encoder = Encoder(make(), Letters(), pooling, **more)
    for folder in folders:
        encoder.adapters.register(folder.name, folder)
    return encoder


def run(encoder: Encoder) -> None:
    while encoder.step():
        pass


@pytest.mark.parametrize("tight", [False, True])
def test_every_text_gets_its_own_adapters_vector(saved: list[Path], tight: bool) -> None:
    memory = None
    if tight:
        sizes = [version.size for version in encoder_over(saved).adapters.versions()]
        memory = Memory(max(sizes), 0)
    encoder = encoder_over(saved, memory=memory)
    asked = [(folder, encoder.submit(name_of(folder), TEXTS)[1]) for folder in (None, *saved)]
    run(encoder)
    for folder, found in asked:
        for tokens, each in zip(TEXTS, found, strict=True):
            got, expected = torch.tensor(each.result()), vector(folder, tokens)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert {version.answering for version in encoder.adapters.versions()} == {0}
    if tight:
        assert encoder.adapters.tiers.evictions > 0
    else:
        before = encoder.calls
        for folder in (None, *saved):
            encoder.submit(name_of(folder), TEXTS)
        run(encoder)
        assert encoder.calls == before + 1, "texts of several adapters share a call"


def test_calls_keep_to_their_room(saved: list[Path]) -> None:
    encoder = encoder_over(saved, room=Room(rows=3, tokens=24, queue=8))
    shapes: list[tuple[int, ...]] = []
    own = encoder.encoding.rows
    encoder.encoding.rows = lambda texts, names: (  # type: ignore[method-assign]
        shapes.append((len(texts), max(map(len, texts)))) or own(texts, names)  # type: ignore[func-returns-value]
    )
    _, found = encoder.submit(None, TEXTS)
    with pytest.raises(Overloaded):
        encoder.submit(None, TEXTS)
    found[1].cancel()
    run(encoder)
    assert all(rows <= 3 and (rows == 1 or rows * longest <= 24) for rows, longest in shapes)
    assert sum(rows for rows, _ in shapes) == len(TEXTS) - 1, "nobody reads the cancelled one"


def test_one_bad_text_does_not_hurt_another(saved: list[Path], tmp_path: Path) -> None:
    encoder = encoder_over(saved)

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        if bool((args[0] == 63).any()):
            raise RuntimeError("no memory for this one")
        return torch.where((args[0] == 62)[..., None], float("nan"), output)

    encoder.encoding.model.get_input_embeddings().register_forward_hook(hook)
    _, found = encoder.submit("one", [TEXTS[1], (5, 63), (5, 62), TEXTS[2]])
    run(encoder)
    for at, tokens in ((0, TEXTS[1]), (3, TEXTS[2])):
        expected = vector(saved[0], tokens)
        torch.testing.assert_close(torch.tensor(found[at].result()), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ServeError, match="no memory"):
        found[1].result()
    with pytest.raises(ServeError, match="NaN"):
        found[2].result()
    with pytest.raises(UnknownAdapter):
        encoder.submit("other", TEXTS)
    encoder.close()
    with pytest.raises(ServeError, match="closed"):
        encoder.submit(None, TEXTS)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_failed(
    saved: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_over(saved)
    _, [found] = encoder.submit(None, [(1, 2)])

    def broken() -> bool:
        raise OSError("no thread goes on after this")

    monkeypatch.setattr(encoder, "step", broken)
    with encoder, pytest.raises(ServeError, match="could not be answered"):
        found.result(timeout=20)
    assert encoder.closed


def test_texts_that_cannot_be_taken_are_named(saved: list[Path]) -> None:
    encoder = encoder_over(saved)
    with pytest.raises(RequestRefused) as error:
        encoder.encoding.tokens_of(["", "a" * 65, "fine", [99]])
    assert [fault[:7] for fault in error.value.faults] == ["input 0", "input 1", "input 3"]


@pytest.fixture
def client(saved: list[Path]) -> Iterator[TestClient]:
    with (
        encoder_over(saved) as encoder,
        TestClient(application(encoder, "base"), base_url="http://127.0.0.1") as client,
    ):
        yield client


def test_embeddings_as_openais_clients_ask_for_them(client: TestClient, saved: list[Path]) -> None:
    body = {"model": "two", "input": ["abc", "defgh"]}
    reply = client.post("/v1/embeddings", json=body).json()
    assert reply["usage"] == {"prompt_tokens": 8, "total_tokens": 8}
    packed = client.post("/v1/embeddings", json=body | {"encoding_format": "base64"}).json()
    for text, one, other in zip(body["input"], reply["data"], packed["data"], strict=True):
        tokens = tuple(Letters()(text)["input_ids"])
        expected = vector(saved[1], tokens)
        torch.testing.assert_close(torch.tensor(one["embedding"]), expected, rtol=1e-5, atol=1e-6)
        raw = base64.b64decode(other["embedding"])
        unpacked = torch.tensor(struct.unpack(f"<{len(raw) // 4}f", raw))
        assert torch.equal(unpacked, torch.tensor(one["embedding"]))
    same = client.post("/v1/embeddings", json={"model": "base", "input": [5, 6, 7]}).json()
    torch.testing.assert_close(
        torch.tensor(same["data"][0]["embedding"]), vector(None, (5, 6, 7)), rtol=1e-5, atol=1e-6
    )
    listed = client.get("/v1/models").json()["data"]
    assert [each["id"] for each in listed] == ["base", "one", "three", "two"]
    assert client.get("/healthz").status_code == 200


def test_an_encoder_counts_and_says_what_it_takes(client: TestClient) -> None:
    """As a language model's server does: every response, refused ones too."""
    for model in ("one", "two", "nobody"):
        client.post("/v1/embeddings", json={"model": model, "input": ["abc", "d"]})
    text = client.get("/metrics").text
    for line in (
        'sidepath_responses_total{status="200"} 2.0',
        'sidepath_responses_total{status="404"} 1.0',
        "sidepath_texts_total 4.0",
        "sidepath_waiting 0.0",
        "sidepath_adapters 3.0",
        "sidepath_adapters_resident 2.0",
    ):
        assert line in text.splitlines(), text
    assert client.get("/readyz").text == "ready"
    said = client.get("/openapi.json").json()
    assert said == json.loads(json.dumps(encoder_document(pooled=True)))
    application: Any = client.app
    assert said["paths"].keys() == {route.path for route in application.routes}


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"model": "fuor", "input": "a"}, 404, "no model"),
        ({"model": "one", "input": []}, 400, "too many texts, or none"),
        ({"model": "one", "input": [1.5]}, 400, "cannot be read"),
        ({"model": "one", "input": "a", "dimensions": 3, "other": 1}, 400, "dimensions"),
        ({"input": "a"}, 400, "model is missing"),
        ({"model": "one", "input": ["a", "\ud800"]}, 400, "not Unicode"),
        ({"model": "one", "input": "a" * 65}, 400, "65 tokens"),
    ],
)
def test_bad_bodies(client: TestClient, body: Any, status: int, says: str) -> None:
    reply = client.post("/v1/embeddings", content=json.dumps(body))
    assert reply.status_code == status
    assert says in reply.json()["error"]["message"]


def test_classes_by_each_adapters_own_head_and_names(classes: list[Path]) -> None:
    encoder = encoder_over(classes, make=labelled)
    with encoder, TestClient(application(encoder, "base"), base_url="http://127.0.0.1") as client:
        for folder in (None, *classes):
            name = "base" if folder is None else folder.name
            texts = [list(tokens) for tokens in TEXTS]
            reply = client.post("/v1/classify", json={"model": name, "input": texts}).json()
            for tokens, found in zip(TEXTS, reply["data"], strict=True):
                logits = alone(labelled, folder, tokens).logits[0]
                expected = logits.softmax(dim=0)
                probs = torch.tensor(found["probs"])
                torch.testing.assert_close(probs, expected, rtol=1e-4, atol=1e-6)
                label = LABELS[int(expected.argmax())]
                assert found["label"] == (label if folder is None else f"{name}-{label}")
                assert found["num_classes"] == 2


def test_a_base_with_a_fresh_head_is_not_asked(classes: list[Path]) -> None:
    encoder = encoder_over(classes, make=labelled, alone=False)
    with pytest.raises(UnknownAdapter, match="no classes of its own"):
        encoder.submit(None, TEXTS)


def test_probabilities_are_those_of_torch() -> None:
    logits = [1.0, -2.0, 700.0, 699.0]
    expected = torch.tensor(logits, dtype=torch.float64).softmax(dim=0)
    torch.testing.assert_close(torch.tensor(softmax(logits), dtype=torch.float64), expected)
    assert softmax([0.0]) == [0.5]


STATES = torch.arange(24, dtype=torch.float32).view(2, 4, 3)
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def described(folder: Path, modules: list[dict[str, str]], **pooling: bool) -> Path:
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20}))
    return folder


def module(kind: str, path: str = "") -> dict[str, str]:
    return {"type": f"sentence_transformers.models.{kind}", "path": path}


def test_pooling_is_what_the_folder_says(tmp_path: Path) -> None:
    modules = [module("Transformer"), module("Pooling", "1_Pooling"), module("Normalize")]
    ways = {f"pooling_mode_{way}": True for way in ("cls_token", "max_tokens", "lasttoken")}
    pooling = pooling_of(described(tmp_path, modules, **ways, pooling_mode_mean_tokens=False))
    assert (pooling.normalised, pooling.most_tokens) == (True, 20)
    whole = torch.cat([STATES[1, 0], STATES[1, 1], STATES[1, 1]])
    torch.testing.assert_close(pooling.of(STATES, MASK)[1], whole / whole.norm())
    assert pooling_of(tmp_path / "none") == Pooling()
    mean, root = Pooling(), Pooling(("pooling_mode_mean_sqrt_len_tokens",))
    torch.testing.assert_close(mean.of(STATES, MASK)[1], STATES[1, :2].mean(dim=0))
    torch.testing.assert_close(root.of(STATES, MASK)[1], STATES[1, :2].sum(dim=0) / 2**0.5)


def test_what_cannot_be_pooled_is_named(tmp_path: Path) -> None:
    modules = [module("Transformer"), module("Pooling", "1_Pooling"), module("Dense", "2_Dense")]
    with pytest.raises(StoreError) as error:
        pooling_of(described(tmp_path, modules, pooling_mode_weightedmean_tokens=True))
    assert len(error.value.faults) == 3
