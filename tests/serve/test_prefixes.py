"""Rows that begin alike are computed once, and no adapter is ever given another's."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidepath.serve.cache import RowsCache
from sidepath.serve.engine import Engine
from sidepath.serve.prefixes import LEAST, Prefixes, common
from sidepath.serve.requests import Handle, Request
from sidepath.serve.scheduler import Limits
from sidepath.serve.tiers import Memory
from tests.conftest import tiny_llama
from tests.serve.kit import Alone, save_adapters, tiny_gemma3

LIMITS = Limits(rows=4, slots=2, step_tokens=24, context=120, patience=3, prefixes=3)
SHARED = tuple(range(5, 45))


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gemma3])
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, list[Path], Alone]:
    folders = save_adapters(request.param, tmp_path_factory.mktemp("saved"), 3)
    return request.param, folders, Alone(request.param, folders)


def engine_over(make: Any, folders: list[Path], **more: Any) -> Engine:
    engine = Engine(make(), limits=LIMITS, **more)
    for folder in folders:
        engine.adapters.load(folder.name, folder)
    return engine


def name_of(adapter: int | None) -> str | None:
    return None if adapter is None else f"adapter-{adapter}"


def run(engine: Engine) -> None:
    while engine.step():
        pass


def test_a_common_beginning_is_computed_once_an_adapter(
    saved: tuple[Any, list[Path], Alone],
) -> None:
    make, folders, alone = saved
    engine = engine_over(make, folders)
    for adapter in (None, 0, 1):
        first = engine.submit(Request((*SHARED, 50), name_of(adapter), 4))
        run(engine)
        before = engine.computed_tokens
        again = engine.submit(Request((*SHARED, 51, 52), name_of(adapter), 4))
        run(engine)
        assert (first.reused, again.reused) == (0, len(SHARED))
        found = again.result().tokens
        assert engine.computed_tokens - before == 2 + len(found) - 1
        assert found == alone.tokens(adapter, (*SHARED, 51, 52), 4)
    assert engine.prefixes.hits == 3
    assert engine.prefixes.tokens == 3 * len(SHARED)


def test_the_whole_of_an_answer_is_a_beginning_too(saved: tuple[Any, list[Path], Alone]) -> None:
    make, folders, alone = saved
    engine = engine_over(make, folders)
    first = engine.submit(Request(SHARED, "adapter-1", 6))
    run(engine)
    answer = first.result().tokens
    longer = (*SHARED, *answer, 7, 8)
    second = engine.submit(Request(longer, "adapter-1", 5))
    same = engine.submit(Request(longer, "adapter-1", 5))
    run(engine)
    assert second.reused == len(SHARED) + len(answer) - 1
    third = engine.submit(Request(longer, "adapter-1", 5))
    run(engine)
    assert third.reused == len(longer) - 1, "one token is left to be computed"
    expected = alone.tokens(1, longer, 5)
    assert [each.result().tokens for each in (second, same, third)] == [expected] * 3


def test_a_row_that_runs_lends_what_it_has(saved: tuple[Any, list[Path], Alone]) -> None:
    make, folders, alone = saved
    engine = engine_over(make, folders)
    first = engine.submit(Request(SHARED, "adapter-0", 30))
    engine.step()  # 24 tokens of the prompt
    second = engine.submit(Request((*SHARED, 9), "adapter-0", 4))
    other = engine.submit(Request((*SHARED, 9), "adapter-0", 4, salt="someone else"))
    run(engine)
    assert (second.reused, other.reused) == (24, 0)
    assert first.result().tokens == alone.tokens(0, SHARED, 30)
    for handle in (second, other):
        assert handle.result().tokens == alone.tokens(0, (*SHARED, 9), 4)


def test_no_adapter_and_no_version_is_given_anothers(saved: tuple[Any, list[Path], Alone]) -> None:
    make, folders, alone = saved
    engine = engine_over(make, folders[:2])
    prompt = (*SHARED, 50)
    for adapter in (0, 1, None):
        handle = engine.submit(Request(prompt, name_of(adapter), 3))
        run(engine)
        assert handle.reused == 0
        assert handle.result().tokens == alone.tokens(adapter, prompt, 3)
    engine.adapters.load("adapter-0", folders[2])  # the same name, another version
    handle = engine.submit(Request(prompt, "adapter-0", 3))
    run(engine)
    assert handle.reused == 0
    assert handle.result().tokens == alone.tokens(2, prompt, 3)
    kept = [held.key[0] for held in engine.prefixes._kept.values()]
    there = {version.internal for version in engine.adapters.versions()}
    assert set(kept) <= {None, *there}, "nothing is kept of a version that is gone"


@pytest.mark.parametrize("small", [False, True])
def test_answers_stay_those_of_each_adapter_alone(
    saved: tuple[Any, list[Path], Alone], small: bool
) -> None:
    """Random beginnings of few kinds, joins, cancels, reloads; and adapters that come and go."""
    make, folders, alone = saved
    rng = random.Random(8)
    more = {"memory": Memory(1, 0)} if small else {}
    if small:
        sizes = [v.size for v in engine_over(make, folders).adapters.versions()]
        more = {"memory": Memory(max(sizes), 0)}
    engine = engine_over(make, folders, **more)
    beginnings = [tuple(rng.randrange(3, 64) for _ in range(LEAST + 9)) for _ in range(2)]
    asked: list[tuple[Handle, int | None]] = []
    for number in range(26):
        adapter = rng.choice([None, 0, 1, 2])
        prompt = rng.choice(beginnings) + tuple(
            rng.randrange(3, 64) for _ in range(rng.randint(0, 3))
        )
        asked.append((engine.submit(Request(prompt, name_of(adapter), rng.randint(1, 7))), adapter))
        for _ in range(rng.randint(0, 3)):
            engine.step()
        if rng.random() < 0.2:
            rng.choice(asked)[0].cancel()
        if number % 9 == 8:
            engine.adapters.load("adapter-2", folders[2])
    run(engine)
    for handle, adapter in asked:
        got, request = handle.result(), handle.request
        expected = alone.tokens(adapter, request.prompt, request.max_new_tokens)
        assert got.tokens == expected[: len(got.tokens)]
        assert got.finish == "cancelled" or got.tokens == expected
    assert engine.prefixes.hits >= 3
    assert engine._scheduler.reserved == 0
    assert engine._runner.cache.taken == 0


class Model:
    """A cache whose rows are written by hand: a row's key at a position is its token."""

    def __init__(self, rows: int, kept: int) -> None:
        self.cache = RowsCache(1, rows, 40, kept=kept)
        self.prefixes = Prefixes(self.cache, least=2)

    def write(self, owner: int, tokens: list[int], start: int, adapter: int) -> None:
        new = tokens[start:]
        self.cache.select([owner], [start], len(new))
        states = torch.tensor([[[[float(100 * adapter + t)] for t in new]]])
        self.cache.layers[0].update(states, states)

    def row(self, owner: int) -> list[float]:
        return [float(x) for x in self.cache.layers[0].keys[self.cache.row_of(owner), 0, :, 0]]


calls = st.lists(
    st.tuples(
        st.integers(0, 2),  # adapter
        st.lists(st.integers(1, 2), min_size=1, max_size=8),
        st.booleans(),  # the oldest ends first
        st.booleans(),  # kept
    ),
    max_size=14,
)


@settings(max_examples=80, deadline=None)
@given(calls, st.integers(0, 3))
def test_a_row_holds_its_own_tokens_whatever_was_copied(
    asked: list[tuple[int, list[int], bool, bool]], kept: int
) -> None:
    model, running = Model(3, kept), list[tuple[int, int, list[int]]]()
    seen: list[tuple[int, list[int]]] = []
    for owner, (adapter, tokens, leave, keep) in enumerate(asked):
        if len(running) == 3 or (leave and running):
            number, own, written = running.pop(0)
            model.prefixes.end(number, keep=keep)
            seen.append((own, written))
        start = model.prefixes.begin(owner, (f"v{adapter}", ""), tokens)
        possible = [(own, held) for own, held in seen] + [(own, held) for _, own, held in running]
        best = max(
            (common(held, tokens, len(tokens) - 1) for own, held in possible if own == adapter),
            default=0,
        )
        assert start <= best
        assert start == 0 or start >= 2
        model.write(owner, tokens, start, adapter)
        running.append((owner, adapter, tokens))
        for number, own, held in running:
            expected = [100.0 * own + t for t in held]
            assert model.row(number) == expected + [0.0] * (40 - len(held))
    assert len(model.prefixes._kept) <= kept
    for adapter in range(3):
        model.prefixes.drop(f"v{adapter}")
    for number, _, _ in running:
        model.prefixes.end(number, keep=False)
    if asked:
        assert not model.cache.layers[0].keys.any()


def test_the_longest_unused_is_given_up_and_a_longer_one_takes_its_beginnings_place() -> None:
    model = Model(1, 2)

    def answered(tokens: list[int], adapter: int = 0) -> int:
        start = model.prefixes.begin(0, (f"v{adapter}", ""), tokens)
        model.write(0, tokens, start, adapter)
        model.prefixes.end(0, keep=True)
        return start

    assert answered([1, 2, 3]) == 0
    assert answered([1, 2, 3, 4, 5]) == 3
    assert len(model.prefixes._kept) == 1, "the longer one took its place"
    assert answered([1, 2, 3, 4, 5, 6], adapter=1) == 0
    assert answered([1, 2, 3, 4, 9]) == 4
    assert [held.key[0] for held in model.prefixes._kept.values()] == ["v0", "v0"] or len(
        model.prefixes._kept
    ) == 2
    assert answered([1, 2, 3, 4, 5, 6], adapter=1) == 0, "it had not been used for longest"
