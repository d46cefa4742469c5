"""Merged models: the base's own code, and one merged adapter swapped for another."""

from __future__ import annotations

import copy

import pytest
import torch

from sidepath.injection.merging import merge, unmerge
from sidepath.injection.registry import require_registry
from sidepath.injection.surgery import activate, remove
from sidepath.methods.lora import LoRA
from tests.calls import calls_in, shadow_forward
from tests.conftest import MODELS, outputs, tiny_llama
from tests.injection.test_surgery import put, same_state, snapshot


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_unmerge_that_keeps_its_memory_swaps_without_new_memory(kind: str) -> None:
    make, inputs = MODELS[kind]
    model, x = make(), inputs()
    before = snapshot(model)
    config = LoRA(r=3, train_whole=("classifier",) if kind == "bert" else ())
    for name in "ab":
        put(model, config, name)
    expected = {}
    for name in "ab":
        activate(model, name)
        merge(model, name)
        expected[name] = outputs(model, x)
        unmerge(model)
    own = {n: p.clone() for n, p in model.named_parameters() if "sidepath" in n}
    memory = set()
    for turn in range(6):
        merge(model, "ab"[turn % 2])
        assert torch.equal(outputs(model, x), expected["ab"[turn % 2]])
        paths = require_registry(model).adapters["a"].sites
        dense = [path for path, site in paths.items() if site.kind == "dense"]
        memory.add(tuple(model.get_submodule(p).weight.data_ptr() for p in dense))  # type: ignore[operator]
        unmerge(model, keep=True)
    assert len(memory) == 1, "every merge writes where the first one did"
    assert set(require_registry(model).spare) == set(dense)
    changed = [n for n, p in model.named_parameters() if n in own and not torch.equal(p, own[n])]
    assert not changed, "what an adapter owns is never written into"
    merge(model, "b")
    assert not require_registry(model).spare
    unmerge(model)
    assert not require_registry(model).spare
    for name in "ab":
        remove(model, name)
    assert same_state(model, before)


def test_kept_memory_that_does_not_fit_the_base_any_more_is_not_used() -> None:
    model, x = tiny_llama(), torch.randint(3, 64, (2, 5))
    put(model, LoRA(), "a")
    merge(model, "a")
    unmerge(model, keep=True)
    model.double()
    activate(model, "a")
    beside = outputs(model, x)
    merge(model, "a")
    torch.testing.assert_close(outputs(model, x), beside, atol=1e-5, rtol=1e-5)
    assert model.get_parameter("model.layers.0.mlp.up_proj.weight").dtype == torch.float64


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vision"])
def test_a_merged_model_runs_the_bases_own_code_call_for_call(kind: str) -> None:
    make, inputs = MODELS[kind]
    model, x = make(), inputs()
    classes = [type(module) for module in model.modules()]
    outputs(model, x)
    base = calls_in(lambda: outputs(model, x))
    put(model, LoRA(r=2), "a")
    put(model, LoRA(r=2), "b")
    activate(model, "a")
    assert len(calls_in(lambda: outputs(model, x))) > len(base)
    merge(model, "a")
    assert calls_in(lambda: outputs(model, x)) == base
    twin = copy.deepcopy(model)
    unmerge(model)
    assert calls_in(lambda: outputs(model, x)) != base
    unmerge(twin)
    assert torch.equal(outputs(twin, x), outputs(model, x))
    for name in "ab":
        remove(model, name)
    assert [type(module) for module in model.modules()] == classes


def test_a_merged_model_calls_the_bases_operators_one_by_one() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Operators(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.seen: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    model, x = tiny_llama(), torch.randint(3, 64, (2, 5))

    def operators() -> list[str]:
        mode = Operators()
        with mode:
            outputs(model, x)
        return mode.seen

    base = operators()
    put(model, LoRA(), "a")
    activate(model, "a")
    assert operators() != base
    merge(model, "a")
    assert operators() == base


def test_a_dispatchers_own_forward_is_heard_while_merged() -> None:
    model, x = tiny_llama(), torch.randint(3, 64, (2, 5))
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    hooked, calls = shadow_forward(layer)
    put(model, LoRA(), "a")
    merge(model, "a")
    outputs(model, x)
    unmerge(model)
    outputs(model, x)
    assert len(calls) == 2
    assert "forward" not in vars(layer)
    remove(model, "a")
    assert layer.forward is hooked


@pytest.mark.parametrize("cycles", [25, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merging_and_swapping_any_number_of_times_changes_no_bit(
    kind: str, dtype: torch.dtype, cycles: int
) -> None:
    """Nothing is subtracted: the base's own storage comes back, whatever was merged in between."""
    model = MODELS[kind][0]().to(dtype)
    before = snapshot(model)
    memory = {name: held.data_ptr() for name, held in model.named_parameters()}
    for name in "ab":
        put(model, LoRA(r=3), name)
    for _ in range(cycles):
        merge(model, "a")
        unmerge(model, keep=True)
        merge(model, "b")
        unmerge(model)
    for name in "ab":
        remove(model, name)
    assert same_state(model, before)
    assert {name: held.data_ptr() for name, held in model.named_parameters()} == memory
