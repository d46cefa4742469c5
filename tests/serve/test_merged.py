"""One adapter merged into the base: its answers at the base's own cost, and exact swaps."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sidepath
from sidepath.errors import ServeError, UnknownAdapter
from sidepath.injection.registry import registry_of
from sidepath.serve.engine import Engine
from sidepath.serve.requests import Request
from sidepath.serve.scheduler import Limits
from sidepath.serve.tiers import Memory
from tests.conftest import tiny_llama
from tests.serve.kit import Alone, save_adapters

SMALL = Limits(rows=4, slots=2, step_tokens=12, context=96, patience=3)
PROMPT = (5, 6, 7, 8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_adapters(tiny_llama, tmp_path_factory.mktemp("merged"), 3)


@pytest.fixture(scope="module")
def alone(folders: list[Path]) -> Alone:
    return Alone(tiny_llama, folders)


def merged_over(folders: list[Path], **more: Any) -> Engine:
    engine = Engine(tiny_llama(), limits=SMALL, merged=True, **more)
    for folder in folders:
        engine.adapters.register(folder.name, folder)
    return engine


def run(engine: Engine) -> None:
    while engine.step():
        pass


def weights(model: Any) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {name: p.detach().clone() for name, p in named if "sidepath" not in name}


def test_swaps_are_exact_and_the_base_comes_back(folders: list[Path], alone: Alone) -> None:
    engine = merged_over(folders)
    base = weights(engine.model)
    for number in (0, 1, 0, 2):
        engine.adapters.dedicate(f"adapter-{number}")
        by_hand: Any = tiny_llama()
        sidepath.load(by_hand, folders[number], name="one")
        sidepath.merge(by_hand, "one")
        found, expected = weights(engine.model), weights(by_hand)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        handle = engine.submit(Request(PROMPT, f"adapter-{number}", 8))
        run(engine)
        assert handle.result().tokens == alone.tokens(number, PROMPT, 8)
    assert [version.name for version in engine.adapters.tiers.resident()] == ["adapter-2"]
    engine.adapters.unload("adapter-2")
    after = weights(engine.model)
    assert all(torch.equal(after[name], base[name]) for name in base)
    assert registry_of(engine.model) is None


def test_nobody_else_is_known(folders: list[Path]) -> None:
    engine = merged_over(folders)
    for name in (None, "adapter-0", "adapter-1"):
        with pytest.raises(UnknownAdapter):
            engine.submit(Request(PROMPT, name, 2))
    engine.adapters.dedicate("adapter-0")
    with pytest.raises(UnknownAdapter, match="the base is not served"):
        engine.submit(Request(PROMPT, None, 2))
    with pytest.raises(UnknownAdapter, match='"adapter-0" is merged into it'):
        engine.submit(Request(PROMPT, "adapter-1", 2))
    with pytest.raises(UnknownAdapter):
        engine.adapters.dedicate("adapter-9")
    with pytest.raises(ServeError, match="merged=True"):
        Engine(tiny_llama(), limits=SMALL).adapters.dedicate("adapter-0")


@pytest.mark.parametrize("threaded", [False, True])
def test_what_was_begun_is_answered_by_the_one_it_began_with(
    folders: list[Path], alone: Alone, threaded: bool
) -> None:
    engine = merged_over(folders, memory=Memory(2**30, 0))
    if threaded:
        engine.__enter__()
    engine.adapters.dedicate("adapter-0")
    asked = []
    for number in (1, 2, 0, 1):
        previous = engine.adapters._dedicated
        asked += [engine.submit(Request((*PROMPT, n), previous, 9)) for n in (9, 10)]
        if not threaded:
            engine.step()
        engine.adapters.dedicate(f"adapter-{number}")
        asked += [engine.submit(Request((*PROMPT, n), f"adapter-{number}", 5)) for n in (9, 10)]
    if not threaded:
        run(engine)
    for handle in asked:
        request = handle.request
        number = int((request.adapter or "")[-1])
        expected = alone.tokens(number, request.prompt, request.max_new_tokens)
        assert handle.result().tokens == expected
    engine.close()


class Counted(TorchDispatchMode):
    """Counts torch's operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_it_costs_what_the_base_costs(folders: list[Path]) -> None:
    # Frozen, as a base with adapters is: torch multiplies other tensors in other ways.
    base, merged = Engine(tiny_llama().requires_grad_(False), limits=SMALL), merged_over(folders)
    merged.adapters.dedicate("adapter-1")
    counts = []
    for engine, name in ((base, None), (merged, "adapter-1")):
        for _ in range(2):  # the first allocates
            requests = [Request((*PROMPT, n), name, 5, end=frozenset()) for n in range(3, 6)]
            handles = [engine.submit(request) for request in requests]
            with Counted() as counted:
                run(engine)
            assert {len(handle.result().tokens) for handle in handles} == {5}
        counts.append(counted.calls)
    assert counts[0] == counts[1]
    assert counts[0].total() > 100
