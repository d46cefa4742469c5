"""Adapters that are registered, brought when they are asked for, and leave: by the engine."""

from __future__ import annotations

import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

import sidepath
from sidepath import LoRA, PrefixTuning
from sidepath.errors import DamagedAdapter, RequestRefused, ServeError, UnknownAdapter, WrongBase
from sidepath.injection.registry import registry_of
from sidepath.serve import adapters as module
from sidepath.serve.engine import Engine
from sidepath.serve.reading import read
from sidepath.serve.requests import Handle, Request
from sidepath.serve.scheduler import Limits
from sidepath.serve.tiers import Memory
from tests.conftest import randomise, tiny_llama
from tests.serve.kit import Alone, save_adapters

COUNT = 4
SMALL = Limits(rows=4, slots=2, step_tokens=12, context=96, patience=3)


class Saved:
    """Saved adapters of the tiny Llama, and what each answers alone."""

    def __init__(self, folder: Path) -> None:
        self.folders = save_adapters(tiny_llama, folder, COUNT)
        self.alone = Alone(tiny_llama, self.folders)
        sizes = [version.size for version in self.engine().adapters.versions()]
        self.largest, self.total = max(sizes), sum(sizes)

    def engine(self, memory: Memory | None = None, limits: Limits = SMALL) -> Engine:
        engine = Engine(tiny_llama(), limits=limits, memory=memory)
        for folder in self.folders:
            engine.adapters.register(folder.name, folder)
        return engine


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("saved"))


def ask(engine: Engine, adapter: int | None, prompt: tuple[int, ...], new: int) -> Handle:
    return engine.submit(Request(prompt, None if adapter is None else f"adapter-{adapter}", new))


def run(engine: Engine) -> None:
    while engine.step():
        pass


def test_registering_reads_no_weights_and_changes_no_model(saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved.folders[0], tmp_path / "adapter-0")
    weights = tmp_path / "adapter-0" / "adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1  # a weight
    weights.write_bytes(bytes(raw))
    engine = Engine(tiny_llama(), limits=SMALL)
    version = engine.adapters.register("adapter-0", tmp_path / "adapter-0")
    assert registry_of(engine.model) is None
    assert (version.standing, version.answering) == ("away", 0)
    assert len(version.digest or "") == 64
    handle = ask(engine, 0, (5, 6), 2)
    run(engine)
    with pytest.raises(ServeError, match="not those that were saved"):
        handle.result()
    assert registry_of(engine.model) is None


@pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
@pytest.mark.parametrize("host", [0, 2**20])
def test_answers_are_those_of_each_adapter_alone_however_little_memory(
    saved: Saved, share: float, host: int
) -> None:
    memory = Memory(max(saved.largest, int(saved.total * share)), host)
    engine, rng = saved.engine(memory), random.Random(9)
    asked: list[tuple[Handle, int | None]] = []
    for number in range(24):
        adapter = rng.choice([None, 0, 1, 2, 3])
        prompt = tuple(rng.randrange(3, 64) for _ in range(rng.randint(1, 20)))
        asked.append((ask(engine, adapter, prompt, rng.randint(1, 8)), adapter))
        for _ in range(rng.randint(0, 2)):
            engine.step()
        if rng.random() < 0.2:
            rng.choice(asked)[0].cancel()
        if number % 8 == 7:  # anew, while the old one may answer
            engine.adapters.load("adapter-1", saved.folders[1])
        assert engine.adapters.tiers.bytes <= memory.resident
    run(engine)
    for handle, adapter in asked:
        got = handle.result()
        request = handle.request
        expected = saved.alone.tokens(adapter, request.prompt, request.max_new_tokens)
        assert got.tokens == (expected if got.finish != "cancelled" else got.tokens)
        assert got.tokens == expected[: len(got.tokens)]
    assert {version.answering for version in engine.adapters.versions()} == {0}
    assert engine.load == (0, 0, 0)
    if share < 0.5:
        assert engine.adapters.tiers.evictions > 0


def test_a_version_in_use_stays_and_who_waits_for_room_comes_in_the_end(saved: Saved) -> None:
    engine = saved.engine(Memory(saved.largest))
    first = ask(engine, 0, (5, 6, 7), 12)
    engine.step()
    while engine.adapters.tiers.bytes == 0:
        engine.step()
    rare = ask(engine, 1, (5, 6, 7), 2)
    popular = [ask(engine, 0, (5, 6, 8), 12) for _ in range(12)]
    ended_before = 0
    for _ in range(400):
        running = set(engine._scheduler.slots)
        on_model = {version.internal for version in engine.adapters.tiers.resident()}
        assert running <= on_model
        if not engine.step():
            break
        if not ended_before and engine._scheduler.runs(f"serving-{rare.generation}"):
            ended_before = engine.ended.total()
    assert rare.result().tokens == saved.alone.tokens(1, (5, 6, 7), 2)
    assert first.result().tokens == saved.alone.tokens(0, (5, 6, 7), 12)
    for handle in popular:
        assert handle.result().tokens == saved.alone.tokens(0, (5, 6, 8), 12)
    assert 0 < ended_before <= 1 + 3 + SMALL.patience + 1, "not after all of the popular one's"


class Gate:
    """Holds up the reading of adapters until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.open = threading.Event(), threading.Event()

        def slow(*args: Any) -> Any:
            self.begun.set()
            assert self.open.wait(60)
            return read(*args)

        monkeypatch.setattr(module, "read", slow)


def test_others_go_on_while_an_adapter_is_read(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with saved.engine() as engine:
        cold = ask(engine, 2, (5, 6, 7), 4)
        assert gate.begun.wait(60)
        for _ in range(3 * SMALL.patience):  # nobody is held up by one that is being read
            got = ask(engine, None, (5, 6, 7), 3).result()
            assert got.tokens == saved.alone.tokens(None, (5, 6, 7), 3)
        assert engine.load[0] == 1
        gate.open.set()
        assert cold.result().tokens == saved.alone.tokens(2, (5, 6, 7), 4)
        assert engine.adapters.tiers.loads == 1


def test_who_is_unloaded_or_cancelled_while_it_is_read_leaves_nothing(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with saved.engine() as engine:
        handle = ask(engine, 3, (5, 6), 4)
        assert gate.begun.wait(60)
        version = engine.adapters.unload("adapter-3")
        handle.cancel()
        assert handle.result().finish == "cancelled"
        with pytest.raises(UnknownAdapter):
            ask(engine, 3, (5, 6), 4)
        assert not version.gone.is_set()
        gate.open.set()
        assert version.gone.wait(60)
    assert registry_of(engine.model) is None
    assert engine.adapters.tiers.host.bytes == 0


def test_a_load_that_fails_answers_its_own_requests_with_an_error(
    saved: Saved, tmp_path: Path
) -> None:
    place = tmp_path / "moved"
    shutil.copytree(saved.folders[0], place)
    engine = saved.engine()
    engine.adapters.register("moved", place)
    place.rename(tmp_path / "elsewhere")
    handles = [engine.submit(Request((5, 6, 7 + n), "moved", 3)) for n in range(3)]
    others = [ask(engine, adapter, (5, 6, 7), 3) for adapter in (0, None, 1)]
    run(engine)
    for handle in handles:
        with pytest.raises(ServeError, match="no adapter folder"):
            handle.result()
    for handle, adapter in zip(others, (0, None, 1), strict=True):
        assert handle.result().tokens == saved.alone.tokens(adapter, (5, 6, 7), 3)
    assert engine.ended["error"] == 3
    (tmp_path / "elsewhere").rename(place)
    again = engine.submit(Request((5, 6, 7), "moved", 3))
    run(engine)
    assert again.result().tokens == saved.alone.tokens(0, (5, 6, 7), 3)


def test_a_folder_that_changed_is_not_taken_for_what_it_was(saved: Saved, tmp_path: Path) -> None:
    place = tmp_path / "changing"
    shutil.copytree(saved.folders[0], place)
    engine = saved.engine(Memory(saved.largest, 0))
    engine.adapters.register("changing", place)
    first = engine.submit(Request((5, 6, 7), "changing", 3))
    run(engine)
    ask(engine, 1, (5,), 1)
    run(engine)  # it leaves the model
    shutil.rmtree(place)
    shutil.copytree(saved.folders[2], place)
    changed = engine.submit(Request((5, 6, 7), "changing", 3))
    run(engine)
    assert first.result().tokens == saved.alone.tokens(0, (5, 6, 7), 3)
    with pytest.raises(ServeError, match="holds another adapter than it did"):
        changed.result()
    engine.adapters.load("changing", place)
    anew = engine.submit(Request((5, 6, 7), "changing", 3))
    run(engine)
    assert anew.result().tokens == saved.alone.tokens(2, (5, 6, 7), 3)


def test_what_cannot_be_registered(saved: Saved, tmp_path: Path) -> None:
    engine = Engine(tiny_llama(), limits=SMALL)
    other: Any = tiny_llama()
    with sidepath.disabled(other):
        other.get_input_embeddings().weight.data += 1
    adapter = sidepath.inject(other, LoRA(r=2, targets=("q_proj",)), name="new")
    randomise(adapter.parameters())
    adapter.save(tmp_path / "other")
    sidepath.remove(other, "new")
    sidepath.inject(tiny_llama(), PrefixTuning(tokens=3), name="ahead").save(tmp_path / "ahead")
    (tmp_path / "none").mkdir()
    with pytest.raises(WrongBase, match="another base"):
        engine.adapters.register("other", tmp_path / "other")
    with pytest.raises(RequestRefused, match="3 positions before each row"):
        engine.adapters.register("ahead", tmp_path / "ahead")
    with pytest.raises(DamagedAdapter):
        engine.adapters.register("none", tmp_path / "none")
    assert engine.adapters.versions() == []
    engine.adapters.register("other", tmp_path / "other", allow_other_base=True)
    handle = engine.submit(Request((5, 6), "other", 2))
    run(engine)
    assert handle.result().finish == "length"


@pytest.mark.filterwarnings("ignore:.*no sidepath.json")
def test_folders_of_peft_and_names_on_the_hub(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "of-peft"
    shutil.copytree(saved.folders[1], place)
    (place / "sidepath.json").unlink()
    fetched: list[str] = []

    def local(source: str, kind: Any) -> Path:
        fetched.append(source)
        return place if source.startswith("hub:") else Path(source)

    monkeypatch.setattr(module, "local", local)
    engine = Engine(tiny_llama(), limits=SMALL)
    assert engine.adapters.register("of-peft", place).digest is None
    hub = engine.adapters.register("hub", "hub:someone/adapter")
    assert (fetched, hub.size) == ([], 0)
    handles = [engine.submit(Request((5, 6, 7), name, 3)) for name in ("of-peft", "hub")]
    run(engine)
    for handle in handles:
        assert handle.result().tokens == saved.alone.tokens(1, (5, 6, 7), 3)
    digests = {version.digest for version in engine.adapters.versions()}
    assert len(digests) == 1
    assert None not in digests
    assert sorted(fetched) == sorted([str(place), "hub:someone/adapter"])
    assert hub.size > 0
