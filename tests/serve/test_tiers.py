"""Adapters in tiers: against a simple LRU, under one budget and another."""

from __future__ import annotations

import gc
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sidepath import LoRA
from sidepath.errors import ConfigError, ServeError
from sidepath.injection.registry import registry_of
from sidepath.serve.engine import Engine
from sidepath.serve.reading import Checked
from sidepath.serve.requests import Request
from sidepath.serve.scheduler import Limits
from sidepath.serve.tiers import Host, Memory
from sidepath.serve.versions import Version
from tests.conftest import tiny_llama
from tests.serve.kit import save_adapters

SMALL = Limits(rows=4, slots=2, step_tokens=12, context=96, patience=3)


@dataclass
class Plain:
    """What the tiers promise, written down: names, the longest unused first."""

    sizes: dict[str, int]
    memory: Memory
    resident: list[str] = field(default_factory=list)
    host: list[str] = field(default_factory=list)
    pinned: set[str] = field(default_factory=set)
    reads: int = 0

    def ask(self, name: str) -> None:
        if name in self.resident:
            self.resident.remove(name)
        else:
            self.reads += name not in self.host
            while self.bytes(self.resident) + self.sizes[name] > self.memory.resident:
                self.down(next(each for each in self.resident if each not in self.pinned))
            if name in self.host:
                self.host.remove(name)
        self.resident.append(name)

    def down(self, name: str) -> None:
        self.resident.remove(name)
        self.host.append(name)
        for each in [each for each in self.host if each not in self.pinned]:
            if self.bytes(self.host) > self.memory.host:
                self.host.remove(each)

    def bytes(self, names: list[str]) -> int:
        return sum(self.sizes[name] for name in names)


def engine_over(folder: Path, memory: Memory, count: int = 6) -> Engine:
    save_adapters(tiny_llama, folder, count)
    engine = Engine(tiny_llama(), limits=SMALL, memory=memory)
    for place in sorted(folder.iterdir()):
        engine.adapters.register(place.name, place)
    return engine


def answer(engine: Engine, name: str | None) -> tuple[int, ...]:
    handle = engine.submit(Request((5, 6, 7), name, 1))
    while engine.step():
        pass
    return handle.result().tokens


def sizes_of(engine: Engine) -> dict[str, int]:
    return {version.name: version.size for version in engine.adapters.versions()}


@pytest.mark.parametrize(("share", "host_share"), [(0.5, 0.3), (0.45, 0.0), (0.7, 0.7)])
def test_the_tiers_hold_what_a_simple_lru_would(
    tmp_path: Path, share: float, host_share: float
) -> None:
    whole = sizes_of(engine_over(tmp_path, Memory()))
    total = sum(whole.values())
    memory = Memory(int(total * share), int(total * host_share))
    engine = Engine(tiny_llama(), limits=SMALL, memory=memory)
    for name in whole:
        engine.adapters.register(name, tmp_path / name)
    plain, rng, names = Plain(whole, memory), random.Random(4), list(whole)
    tiers = engine.adapters.tiers
    for _ in range(90):
        name = rng.choice(names)
        if rng.random() < 0.15:
            pinned = not plain.pinned
            if pinned or name in plain.pinned:
                engine.adapters.pin(name, pinned=pinned)
                plain.pinned ^= {name}
            continue
        pinned_there = set(plain.resident) & plain.pinned - {name}
        if whole[name] > memory.resident - plain.bytes([*pinned_there]):
            with pytest.raises(ServeError, match="no room on the model"):
                answer(engine, name)
            continue
        answer(engine, name)
        plain.ask(name)
        assert {version.name for version in tiers.resident()} == set(plain.resident)
        kept = {each.name for each in engine.adapters.versions() if each in tiers.host}
        assert kept == set(plain.host)
        assert tiers.bytes <= memory.resident
        assert tiers.reads == plain.reads
    assert tiers.evictions > 10
    if host_share:
        assert tiers.reads < tiers.loads, "host memory was of use"
    assert {version.answering for version in engine.adapters.versions()} == {0}


asked = st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=30)


@settings(max_examples=60, deadline=None)
@given(asked, st.integers(0, 60))
def test_host_memory_drops_the_longest_unused(asks: list[tuple[str, bool]], budget: int) -> None:
    host, plain = Host(budget), list[str]()
    sizes = {"a": 8, "b": 12, "c": 16, "d": 24}
    versions = {name: Version(name, n, "") for n, name in enumerate(sizes)}
    for name, drop in asks:
        if name in plain:
            plain.remove(name)
        if drop:
            host.drop(versions[name])
        else:
            tensors = {"there": {"A": torch.zeros(sizes[name], dtype=torch.uint8)}}
            host.keep(versions[name], Checked(LoRA(), (), tensors, ""))
            plain.append(name)
            while sum(sizes[each] for each in plain) > budget:
                del plain[0]
        assert [name for name in sizes if versions[name] in host] == sorted(plain)
        assert host.bytes == sum(sizes[each] for each in plain)


def live_bytes() -> int:
    """Bytes of all tensors there are, each storage once; the base's, laid out, have none."""
    gc.collect()
    kinds = (Tensor, nn.Parameter)  # not torch's imagined ones, that other tests may have left
    objects = [each for each in gc.get_objects() if type(each) in kinds]
    tensors = [each for each in objects if each.is_cpu and not each.is_mkldnn]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def test_memory_returns(tmp_path: Path) -> None:
    """What is on the model takes its own bytes once; what has left takes none."""
    engine = engine_over(tmp_path, Memory(), 4)
    answer(engine, None)  # the cache is allocated
    before = live_bytes()
    for name in sizes_of(engine):
        answer(engine, name)
    engine._runner._routed.clear()
    total = sum(sizes_of(engine).values())
    assert engine.adapters.tiers.bytes == total
    grown = live_bytes() - before
    assert total <= grown < 1.02 * total, "once, though host memory could bring it back"
    for name in sizes_of(engine):
        assert engine.adapters.unload(name).gone.is_set()
    assert live_bytes() == before
    assert registry_of(engine.model) is None
    assert engine.adapters.tiers.host.bytes == 0


def test_what_left_the_model_takes_the_bytes_of_host_memory_alone(tmp_path: Path) -> None:
    whole = sizes_of(engine_over(tmp_path, Memory(), 4))
    one = max(whole.values())
    engine = Engine(tiny_llama(), limits=SMALL, memory=Memory(resident=one, host=0))
    for name in whole:
        engine.adapters.register(name, tmp_path / name)
    answer(engine, None)
    before = live_bytes()
    for name in whole:
        answer(engine, name)
    engine._runner._routed.clear()
    assert live_bytes() - before < 1.02 * one
    assert engine.adapters.tiers.reads == 4


def test_what_is_too_large_is_refused_and_pins_cannot_fill_the_memory(tmp_path: Path) -> None:
    whole = sizes_of(engine_over(tmp_path, Memory(), 3))
    large, small = max(whole, key=whole.__getitem__), min(whole, key=whole.__getitem__)
    engine = Engine(tiny_llama(), limits=SMALL, memory=Memory(whole[large] - 1))
    with pytest.raises(ServeError, match="raise --adapter-memory"):
        engine.adapters.register(large, tmp_path / large)
    with pytest.raises(ServeError, match="raise --adapter-memory"):
        engine.adapters.load(large, tmp_path / large)
    assert engine.adapters.versions() == []
    engine = Engine(tiny_llama(), limits=SMALL, memory=Memory(whole[large]))
    for name in (large, small):
        engine.adapters.register(name, tmp_path / name)
    engine.adapters.pin(small)
    with pytest.raises(ServeError, match="cannot be pinned"):
        engine.adapters.pin(large)
    answer(engine, small)
    with pytest.raises(ServeError, match="that are pinned"):
        answer(engine, large)
    engine.adapters.pin(small, pinned=False)
    assert answer(engine, large)


def test_impossible_budgets_are_named_all_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        Memory(0, -1, 0)
    assert len(error.value.faults) == 3
