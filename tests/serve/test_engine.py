"""The engine: every answer is the one its own adapter gives alone, whatever else goes on."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import sidepath
from sidepath import LoRA, PrefixTuning
from sidepath.errors import (
    BadName,
    DamagedAdapter,
    Overloaded,
    RequestRefused,
    ServeError,
    UnknownAdapter,
    UnsupportedModule,
)
from sidepath.injection.registry import registry_of
from sidepath.serve.engine import Engine
from sidepath.serve.requests import Answer, Handle, Piece, Request
from sidepath.serve.sampling import Sampling
from sidepath.serve.scheduler import Limits
from tests.conftest import tiny_bert, tiny_gpt2, tiny_llama
from tests.serve.kit import BASES, Alone, save_adapters

COUNT = 4
SMALL = Limits(rows=4, slots=2, step_tokens=12, context=96, patience=3)


class Setting:
    """A base with saved adapters, and the reference beside it."""

    def __init__(self, make: Any, folder: Path) -> None:
        self.make = make
        self.folders = save_adapters(make, folder, COUNT)
        self.alone = Alone(make, self.folders)
        self.vocabulary = int(self.alone.model.config.vocab_size)

    def engine(self, limits: Limits = SMALL) -> Engine:
        engine = Engine(self.make(), limits=limits)
        for number, folder in enumerate(self.folders):
            engine.adapters.load(f"adapter-{number}", folder)
        return engine

    def prompt(self, rng: random.Random, longest: int = 40) -> tuple[int, ...]:
        return tuple(rng.randrange(3, self.vocabulary) for _ in range(rng.randint(1, longest)))


@pytest.fixture(scope="module", params=list(BASES))
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(BASES[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tiny_llama, tmp_path_factory.mktemp("llama"))


def name_of(adapter: int | None) -> str | None:
    return None if adapter is None else f"adapter-{adapter}"


def run(engine: Engine) -> None:
    while engine.step():
        pass


def test_mixed_joins_leaves_and_cancels(setting: Setting) -> None:
    rng = random.Random(3)
    engine = setting.engine()
    asked: list[tuple[Handle, int | None]] = []
    cancelled: list[Handle] = []
    for _ in range(14):
        adapter = rng.choice([None, 0, 1, 2, 3])
        request = Request(setting.prompt(rng), name_of(adapter), rng.randint(1, 10))
        asked.append((engine.submit(request), adapter))
        for _ in range(rng.randint(0, 3)):
            engine.step()
        if rng.random() < 0.25:
            handle = rng.choice(asked)[0]
            handle.cancel()
            cancelled.append(handle)
    run(engine)
    for handle, adapter in asked:
        answer = handle.result()
        expected = setting.alone.tokens(
            adapter, handle.request.prompt, handle.request.max_new_tokens
        )
        if answer.finish == "cancelled":
            assert handle in cancelled
            assert answer.tokens == expected[: len(answer.tokens)]
        else:
            assert answer.tokens == expected
            assert answer.finish == ("stop" if expected[-1] in engine._end else "length")
    assert engine.load == (0, 0, 0)
    assert engine._runner.cache.taken == 0
    assert {version.answering for version in engine.adapters.versions()} == {0}
    assert engine.steps < sum(len(handle.request.prompt) for handle, _ in asked)


def test_adapters_differ_so_that_a_mix_up_would_show(setting: Setting) -> None:
    prompt = setting.prompt(random.Random(5))
    answers = {setting.alone.tokens(adapter, prompt, 8) for adapter in (None, 0, 1, 2, 3)}
    assert len(answers) == 5


def test_a_replaced_adapter_answers_its_own_requests_to_the_end(llama: Setting) -> None:
    engine = llama.engine()
    prompt = (5, 6, 7, 8)
    before = engine.submit(Request(prompt, "adapter-0", 9))
    for _ in range(3):
        engine.step()
    first = engine.adapters.versions()[0]
    second = engine.adapters.load("adapter-0", llama.folders[1])
    after = engine.submit(Request(prompt, "adapter-0", 9))
    assert (before.generation, after.generation) == (first.generation, second.generation)
    assert not first.gone.is_set()
    run(engine)
    assert before.result().tokens == llama.alone.tokens(0, prompt, 9)
    assert after.result().tokens == llama.alone.tokens(1, prompt, 9)
    assert first.gone.is_set()
    registry = registry_of(engine.model)
    assert registry is not None
    assert set(registry.adapters) == {version.internal for version in engine.adapters.versions()}


def test_an_unloaded_adapter_is_unknown_at_once_and_leaves_when_drained(llama: Setting) -> None:
    engine = llama.engine()
    handle = engine.submit(Request((5, 6, 7), "adapter-2", 6))
    engine.step()
    version = engine.adapters.unload("adapter-2")
    with pytest.raises(UnknownAdapter, match='no adapter "adapter-2" is loaded'):
        engine.submit(Request((5,), "adapter-2", 6))
    assert not version.gone.is_set()
    run(engine)
    assert handle.result().tokens == llama.alone.tokens(2, (5, 6, 7), 6)
    assert version.gone.is_set()
    for name in ("adapter-0", "adapter-1", "adapter-3"):
        assert engine.adapters.unload(name).gone.is_set()
    assert registry_of(engine.model) is None, "the model is what it was"
    assert engine.submit(Request((5, 6, 7), None, 1)) is not None
    with pytest.raises(UnknownAdapter):
        engine.adapters.unload("adapter-0")


def swap_under_load(setting: Setting, loads: int) -> int:
    """Four callers while one name is loaded again and again: each answer is one version's, whole.

    Returns the number of versions that answered.
    """
    asked: list[tuple[Handle, Answer]] = []
    over = threading.Event()

    def call(engine: Engine, seed: int) -> None:
        rng = random.Random(seed)
        prompts = [setting.prompt(rng, 20) for _ in range(8)]
        while not over.is_set():
            handle = engine.submit(Request(rng.choice(prompts), "swapped", rng.randint(1, 8)))
            asked.append((handle, handle.result()))

    with Engine(setting.make(), limits=SMALL) as engine, ThreadPoolExecutor(4) as pool:
        versions = [engine.adapters.load("swapped", setting.folders[0])]
        callers = [pool.submit(call, engine, seed) for seed in range(4)]
        try:
            while len(versions) < loads:
                folder = setting.folders[len(versions) % COUNT]
                versions.append(engine.adapters.load("swapped", folder))
        finally:
            over.set()
        for caller in callers:
            caller.result()
    folder_of = {version.generation: number % COUNT for number, version in enumerate(versions)}
    for handle, answer in asked:
        request = handle.request
        assert handle.generation is not None
        folder_number = folder_of[handle.generation]
        expected = setting.alone.tokens(folder_number, request.prompt, request.max_new_tokens)
        assert answer.tokens == expected
    assert all(version.gone.is_set() for version in versions[:-1])
    registry = registry_of(engine.model)
    assert registry is not None
    assert list(registry.adapters) == [versions[-1].internal]
    return len({handle.generation for handle, _ in asked})


def test_swaps_under_load(llama: Setting) -> None:
    assert swap_under_load(llama, 40) > 1


@pytest.mark.slow
def test_a_thousand_swaps_under_load(llama: Setting) -> None:
    assert swap_under_load(llama, 1000) > 50


def test_what_cannot_be_loaded_changes_nothing(llama: Setting, tmp_path: Path) -> None:
    engine = llama.engine()
    names = [(version.name, version.generation) for version in engine.adapters.versions()]
    (tmp_path / "bad").mkdir()
    for file in llama.folders[0].iterdir():
        (tmp_path / "bad" / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "bad" / "adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-3] ^= 1
    weights.write_bytes(bytes(raw))
    with pytest.raises(DamagedAdapter):
        engine.adapters.load("adapter-0", tmp_path / "bad")
    with pytest.raises(BadName):
        engine.adapters.load("../up", llama.folders[0])
    other = llama.make()
    sidepath.inject(other, PrefixTuning(tokens=3), name="ahead").save(tmp_path / "ahead")
    with pytest.raises(RequestRefused, match="3 positions before each row"):
        engine.adapters.load("ahead", tmp_path / "ahead")
    assert [(version.name, version.generation) for version in engine.adapters.versions()] == names
    handle = engine.submit(Request((5, 6), "adapter-0", 4))
    run(engine)
    assert handle.result().tokens == llama.alone.tokens(0, (5, 6), 4)


def test_refused_requests_leave_nothing(llama: Setting) -> None:
    engine = llama.engine(Limits(rows=1, slots=1, step_tokens=8, context=32, queue=1))
    with pytest.raises(UnknownAdapter, match='did you mean "adapter-1"'):
        engine.submit(Request((5,), "adaptor-1", 4))
    with pytest.raises(RequestRefused, match="does not know"):
        engine.submit(Request((5, 64, -1), "adapter-1", 4))
    with pytest.raises(RequestRefused, match="at most 32 have room"):
        engine.submit(Request((5,) * 30, "adapter-1", 4))
    with pytest.raises(RequestRefused, match="need a tokenizer"):
        engine.submit(Request((5,), "adapter-1", 4, stop=("x",)))
    engine.submit(Request((5,), "adapter-1", 4))
    with pytest.raises(Overloaded):
        engine.submit(Request((5,), "adapter-1", 4))
    assert [version.answering for version in engine.adapters.versions()] == [0, 1, 0, 0]
    engine.close()
    with pytest.raises(ServeError, match="closed"):
        engine.submit(Request((5,), "adapter-1", 4))
    assert engine.ended == {"cancelled": 1}
    assert {version.answering for version in engine.adapters.versions()} == {0}


def poison(engine: Engine, failing: int, no_number: int) -> None:
    """Let the base fail when it sees one token, and give NaN when it sees another."""

    def hook(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        ids = args[0]
        if bool((ids == failing).any()):
            raise RuntimeError("no memory for this one")
        return torch.where((ids == no_number)[..., None], float("nan"), output)

    embeddings: Any = engine.model.get_input_embeddings()  # type: ignore[operator]
    embeddings.register_forward_hook(hook)


def test_one_bad_request_does_not_hurt_another(llama: Setting) -> None:
    good = [(adapter, (5, 6, 7, 8 + row)) for row, adapter in enumerate((None, 0, 1, 0))]
    expected = [llama.alone.tokens(adapter, prompt, 6) for adapter, prompt in good]
    seen = {token for tokens in expected for token in tokens} | set(range(5, 12))
    failing, no_number = sorted(set(range(3, 64)) - seen)[:2]
    engine = llama.engine()
    poison(engine, failing, no_number)
    handles = []
    for (adapter, prompt), bad in zip(good, (failing, no_number) * 2, strict=True):
        handles.append(engine.submit(Request(prompt, name_of(adapter), 6)))
        handles.append(engine.submit(Request((5, 6, 7, bad), name_of(adapter), 6)))
    run(engine)
    assert [handle.result().tokens for handle in handles[::2]] == expected
    for handle, said in zip(handles[1::2], ("no memory", "NaN") * 2, strict=True):
        with pytest.raises(ServeError, match=said):
            handle.result()
    assert engine._runner.cache.taken == 0
    for layer in engine._runner.cache.layers:
        assert not layer.keys.any()
        assert not layer.values.any()


class Broken:
    """A tokenizer that fails at one token."""

    def __init__(self, at: int) -> None:
        self.at = at

    def decode(self, tokens: list[int], **options: Any) -> str:
        if self.at in tokens:
            raise ValueError("this token has no text")
        return "".join(f"{token:02d}" for token in tokens)


def test_a_fault_in_handing_out_ends_its_own_request_alone(llama: Setting) -> None:
    """The rows of one call whose tokens were handed out before the fault are not answered twice."""
    prompts = [(5, 6, 7, 8 + row) for row in range(4)]
    expected = [llama.alone.tokens(0, prompt, 6) for prompt in prompts]
    others = {t for row in (0, 2, 3) for t in (*expected[row], *prompts[row])}
    at = next(token for token in expected[1] if token not in {*others, *prompts[1]})
    engine = Engine(llama.make(), Broken(at), SMALL)
    engine.adapters.load("adapter-0", llama.folders[0])

    def deaf(piece: Piece) -> None:
        raise KeyError("gone")

    handles = [engine.submit(Request(prompt, "adapter-0", 6)) for prompt in prompts]
    engine.submit(Request((5, 6, 7, 20), "adapter-0", 6), deaf)
    run(engine)
    with pytest.raises(ServeError, match="has no text"):
        handles[1].result()
    for row in (0, 2, 3):
        answer = handles[row].result()
        assert answer.tokens == expected[row]
        shown = expected[row][:-1] if answer.finish == "stop" else expected[row]
        assert answer.text == "".join(f"{token:02d}" for token in shown)
    assert engine.ended["error"] == 1
    assert engine.ended["cancelled"] == 1


def test_nobody_waits_for_ever_when_the_engine_itself_fails(
    llama: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = llama.engine()
    monkeypatch.setattr(engine._scheduler, "batch", lambda: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    handle = engine.submit(Request((5, 6), "adapter-0", 4))
    with engine, pytest.raises(ServeError, match="ZeroDivisionError"):
        handle.result()
    with pytest.raises(ServeError, match="closed"):
        engine.submit(Request((5, 6), "adapter-0", 4))


def test_a_seed_gives_its_tokens_whatever_else_is_in_the_batch(llama: Setting) -> None:
    sampling = Sampling(temperature=1.5, top_p=0.9, seed=77, repetition_penalty=1.2, logprobs=2)
    request = Request((5, 6, 7), "adapter-1", 8, sampling)
    engine = llama.engine()
    alone = engine.submit(request)
    run(engine)
    others = [engine.submit(Request((9, 4), name_of(n), 12)) for n in (None, 1, 0)]
    for _ in range(2):
        engine.step()
    again = engine.submit(request)
    run(engine)
    answer = alone.result()
    assert again.result().tokens == answer.tokens
    assert answer.tokens != llama.alone.tokens(1, (5, 6, 7), 8)
    assert all(each.logprob is not None and len(each.likeliest) == 2 for each in answer.chosen)
    assert all(other.result().finish for other in others)


def test_long_prompts_come_in_pieces_and_short_ones_together(llama: Setting) -> None:
    engine = llama.engine(Limits(rows=4, slots=2, step_tokens=16, context=96))
    handles = [engine.submit(Request((5, 6, 7, 8, 9), "adapter-0", 1)) for _ in range(3)]
    long = engine.submit(Request(tuple(range(3, 53)), "adapter-1", 1))
    assert engine.step()
    assert engine.ended == {"length": 3}
    run(engine)
    assert engine.steps == 5  # 15 tokens and 1 of the long one, then 16, 16, 16 and 1
    assert [handle.result().tokens for handle in handles] == [
        llama.alone.tokens(0, (5, 6, 7, 8, 9), 1)
    ] * 3
    assert long.result().tokens == llama.alone.tokens(1, tuple(range(3, 53)), 1)


def test_models_whose_rows_cannot_be_kept_apart_are_refused() -> None:
    engine = Engine(tiny_gpt2(), limits=SMALL)  # positions that are learned, no grouped queries
    assert engine.limits.context == 64
    with pytest.raises(UnsupportedModule, match="rows of different lengths"):
        Engine(tiny_bert())
    model: Any = tiny_llama()
    model.set_attn_implementation("eager")
    Engine(model, limits=SMALL)
    inner = model.model.layers[1].self_attn
    own = inner.forward

    def blind(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **{**kwargs, "attention_mask": None})

    inner.forward = blind
    with pytest.raises(UnsupportedModule, match="other logits"):
        Engine(model, limits=SMALL)


def test_any_method_beside_layers_can_be_served(tmp_path: Path) -> None:
    model = tiny_llama()
    adapter = sidepath.inject(model, sidepath.Bottleneck(), name="new")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    folders = [adapter.save(tmp_path / "bottleneck")]
    sidepath.remove(model, "new")
    lora = sidepath.inject(model, LoRA(r=2, targets=("q_proj",), dropout=0.5), name="lora")
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    folders.append(lora.save(tmp_path / "lora"))
    alone = Alone(tiny_llama, folders)
    engine = Engine(tiny_llama(), limits=SMALL)
    for number, folder in enumerate(folders):
        engine.adapters.load(f"adapter-{number}", folder)
    handles = [engine.submit(Request((5, 6, 7), name_of(n), 5)) for n in (0, None, 1, 0)]
    run(engine)
    for handle, answering in zip(handles, (0, None, 1, 0), strict=True):
        assert handle.result().tokens == alone.tokens(answering, (5, 6, 7), 5)
