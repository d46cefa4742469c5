"""Verbs in opposites, over every kind of model: what is put in comes out without a trace."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from sidepath.core.routing import Rows, group_rows
from sidepath.errors import (
    BadName,
    MergeError,
    NameTaken,
    RoutingError,
    TiedWeights,
    UnknownAdapter,
)
from sidepath.injection.merging import merge, unmerge
from sidepath.injection.registry import base_parameters, registry_of, require_registry
from sidepath.injection.surgery import activate, disabled, put_in, remove, route
from sidepath.injection.targets import resolve
from sidepath.methods.lora import LoRA
from tests.calls import calls_in, shadow_forward
from tests.conftest import MODELS, outputs, randomise, tiny_bert, tiny_gpt2, tiny_llama

CONFIGS = {
    "llama": [LoRA(r=4), LoRA(r=2, targets=("q_proj", "embed_tokens", "lm_head"))],
    "gpt2": [LoRA(r=4, targets=("c_attn:q,v", "mlp"), bias="lora"), LoRA(r=2, bias="all")],
    "bert": [
        LoRA(r=4, train_whole=("classifier",), bias="all"),
        LoRA(r=2, targets=("query", "value")),
    ],
    "vision": [
        LoRA(r=4, targets=("stem", "grouped"), train_whole=("head",)),
        LoRA(r=2, targets=("*",)),
    ],
}


def put(model: nn.Module, config: LoRA, name: str, train: bool = True) -> None:
    installed = put_in(model, config, name, resolve(model, config))
    if train:
        randomise(installed.parameters())


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(
        torch.equal(after[name], tensor) for name, tensor in before.items()
    )


@pytest.mark.parametrize("kind", MODELS)
def test_a_fresh_injection_changes_no_output_and_remove_leaves_no_trace(kind: str) -> None:
    make, inputs = MODELS[kind]
    model, x = make(), inputs()
    before, plain = snapshot(model), outputs(model, x)
    classes = [type(module) for module in model.modules()]
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    names = set(before)
    for number, config in enumerate(CONFIGS[kind]):
        put(model, config, f"adapter.{number}", train=False)
        activate(model, f"adapter.{number}")
        assert torch.equal(outputs(model, x), plain)
        assert names <= set(model.state_dict()), "base names stay what they were"
        assert not any(parameter.requires_grad for _, parameter in base_parameters(model))
        randomise(require_registry(model).adapters[f"adapter.{number}"].parameters())
        assert not torch.equal(outputs(model, x), plain)
    remove(model, "adapter.0")
    remove(model, "adapter.1")
    assert registry_of(model) is None
    assert same_state(model, before)
    assert torch.equal(outputs(model, x), plain)
    assert [type(module) for module in model.modules()] == classes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_merge_equals_unmerged_and_unmerge_is_exact(kind: str, dtype: torch.dtype) -> None:
    make, inputs = MODELS[kind]
    model, x = make().to(dtype), inputs()
    before, plain = snapshot(model), outputs(model, x)
    put(model, LoRA(r=4, bias="none" if kind == "llama" else "lora"), "a")
    activate(model, "a")
    beside = outputs(model, x)
    for _ in range(20):
        merge(model, "a")
        folded = outputs(model, x)
        with disabled(model):
            assert torch.equal(outputs(model, x), plain)
        assert torch.equal(outputs(model, x), folded)
        unmerge(model)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    torch.testing.assert_close(folded, beside, atol=tolerance, rtol=tolerance)
    assert torch.equal(outputs(model, x), beside)
    remove(model, "a")
    assert same_state(model, before)


def test_a_merged_model_runs_the_bases_own_operations() -> None:
    """Operator calls counted: the merged forward is the base's, call for call."""
    model, x = tiny_llama(), torch.randint(3, 64, (2, 5))

    def count() -> dict[str, int]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            outputs(model, x)
        return {event.key: event.count for event in profile.key_averages()}

    base = count()
    put(model, LoRA(), "a")
    activate(model, "a")
    assert count() != base
    merge(model, "a")
    assert count() == base


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_routed_rows_equal_one_adapter_at_a_time(kind: str) -> None:
    make, _ = MODELS[kind]
    model = make()
    for number, config in enumerate(CONFIGS[kind]):
        put(model, config, f"a{number}")
    names = ["a1", None, "a0", "a1", None, "a0", "a0"]
    x = torch.randint(3, 64, (len(names), 6))
    with route(model, names):
        routed = outputs(model, x)
    for row, name in enumerate(names):
        activate(model, name)
        alone = outputs(model, x[row : row + 1])[0]
        torch.testing.assert_close(routed[row], alone, atol=1e-5, rtol=1e-5)


def test_gradients_flow_to_each_rows_own_adapter() -> None:
    model = tiny_llama()
    put(model, LoRA(r=2), "a")
    put(model, LoRA(r=2), "b")
    with route(model, ["a", None]):
        model(torch.randint(3, 64, (2, 5))).logits.sum().backward()
    adapters = require_registry(model).adapters
    assert all(parameter.grad is not None for parameter in adapters["a"].parameters())
    assert all(parameter.grad is None for parameter in adapters["b"].parameters())


def test_group_rows_keeps_neighbours_as_slices() -> None:
    rows = group_rows(["a", "a", None, "b", "a", "c", "c"])
    assert isinstance(rows, Rows)
    groups = dict(rows.groups)
    assert rows.count == 7
    assert groups["a"].tolist() == [0, 1, 4]  # type: ignore[union-attr]
    assert groups["b"] == slice(3, 4)
    assert groups["c"] == slice(5, 7)
    assert rows.slots == (0, 0, -1, 1, 0, 2, 2)


def test_disabled_is_the_base_to_the_bit_and_nests() -> None:
    model, x = tiny_llama(), torch.randint(3, 64, (2, 5))
    plain = outputs(model, x)
    put(model, LoRA(), "a")
    activate(model, "a")
    adapted = outputs(model, x)
    with disabled(model):
        with disabled(model):
            assert torch.equal(outputs(model, x), plain)
        assert torch.equal(outputs(model, x), plain)
        with route(model, ["a", None]):
            assert torch.equal(outputs(model, x), plain)
    assert torch.equal(outputs(model, x), adapted)
    with pytest.raises(ZeroDivisionError), disabled(model):
        _ = 1 / 0
    assert torch.equal(outputs(model, x), adapted)


def test_activate_writes_once_whatever_is_loaded() -> None:
    """Calls counted: switching costs the same with one adapter and with twenty."""
    import sys

    model = tiny_llama()

    def calls(name: str) -> int:
        seen = 0

        def tracer(frame: object, event: str, arg: object) -> None:
            nonlocal seen
            seen += event == "call"

        sys.setprofile(tracer)
        try:
            activate(model, name)
        finally:
            sys.setprofile(None)
        return seen

    put(model, LoRA(r=1), "a0")
    alone = calls("a0")
    for number in range(1, 20):
        put(model, LoRA(r=1), f"a{number}", train=False)
    assert calls("a19") == alone <= 10


def test_a_deep_copy_is_a_model_of_its_own() -> None:
    model, x = tiny_llama(), torch.randint(3, 64, (2, 5))
    put(model, LoRA(), "a")
    activate(model, "a")
    twin = copy.deepcopy(model)
    adapted = outputs(model, x)
    activate(model, None)
    assert torch.equal(outputs(twin, x), adapted)
    remove(twin, "a")
    assert torch.equal(outputs(twin, x), outputs(model, x))
    assert registry_of(model) is not None


def test_two_adapters_that_train_one_module_whole_share_nothing() -> None:
    model, x = tiny_bert(), torch.randint(3, 64, (2, 5))
    plain = outputs(model, x)
    put(model, LoRA(r=2, targets=("query",), train_whole=("classifier",)), "a")
    put(model, LoRA(r=2, targets=("query",), train_whole=("classifier", "layer.1")), "b", False)
    copied = require_registry(model).adapters["b"].deltas["classifier"]
    assert sorted(copied.tensors()) == ["bias", "weight"]
    inner = require_registry(model).adapters["b"].deltas["bert.encoder.layer.1"]
    assert not [name for name, _ in inner.named_modules() if "sidepath" in name]
    activate(model, "b")
    assert torch.equal(outputs(model, x), plain)


def test_a_dispatchers_own_forward_is_kept() -> None:
    """Device maps shadow `forward` on the instance; the side path must still be heard."""
    model, x = tiny_llama(), torch.randint(3, 64, (2, 5))
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    hooked, calls = shadow_forward(layer)
    plain = outputs(model, x)
    put(model, LoRA(targets=("q_proj",), layers=(0,)), "a")
    activate(model, "a")
    assert not torch.equal(outputs(model, x), plain)
    assert len(calls) == 2
    remove(model, "a")
    assert layer.forward is hooked


def test_names_and_states_that_do_not_fit_are_refused() -> None:
    model = tiny_llama()
    with pytest.raises(UnknownAdapter, match="holds no adapter"):
        activate(model, "sql")
    activate(model, None)
    with pytest.raises(UnknownAdapter), route(model, ["sql"]):
        pass
    put(model, LoRA(), "sql")
    with pytest.raises(NameTaken):
        put(model, LoRA(), "sql")
    for bad in ("", "../x", ".hidden", "a" * 65, "a/b", "a b"):
        with pytest.raises(BadName):
            put(model, LoRA(), bad)
    for good in ("pop", "items", "a.b", "training", "0"):  # names torch's own dict refuses
        put(model, LoRA(r=1), good, train=False)
    with pytest.raises(UnknownAdapter, match='did you mean "sql"'):
        activate(model, "sqll")
    with pytest.raises(MergeError, match="no adapter is merged"):
        unmerge(model)
    merge(model, "sql")
    refused: Callable[[], object]
    for refused in (
        lambda: merge(model, "sql"),
        lambda: merge(model, "pop"),
        lambda: activate(model, "pop"),
        lambda: remove(model, "pop"),
        lambda: put(model, LoRA(), "new"),
        lambda: route(model, ["sql"]).__enter__(),
    ):
        with pytest.raises(MergeError, match='"sql" is merged'):
            refused()
    unmerge(model)
    with pytest.raises(RoutingError, match=r"model\.layers\.0"), route(model, ["sql", None]):
        outputs(model, torch.randint(3, 64, (3, 5)))


def test_a_tied_tensor_is_never_rewritten_in_silence() -> None:
    model = tiny_llama(tied=True)
    before = snapshot(model)
    put(model, LoRA(targets=("embed_tokens",)), "a")
    activate(model, "a")
    with pytest.raises(TiedWeights, match=r"embed_tokens\.weight and lm_head\.weight"):
        merge(model, "a")
    activate(model, None)
    x = torch.randint(3, 64, (2, 5))
    outputs(model, x)
    remove(model, "a")
    assert same_state(model, before)
    gpt2 = tiny_gpt2()
    put(gpt2, LoRA(targets=("attention",)), "a")
    merge(gpt2, "a")  # tied elsewhere, untouched here: no reason to refuse
    unmerge(gpt2)


def test_putting_in_and_taking_out_costs_the_same_whatever_is_loaded() -> None:
    """Python calls counted, with one adapter on the model and with thirty."""
    model = tiny_llama()
    put(model, LoRA(r=1), "first", train=False)
    put(model, LoRA(r=1), "x", train=False)
    alone = len(calls_in(lambda: remove(model, "x")))
    into = len(calls_in(lambda: put(model, LoRA(r=1), "x", train=False)))
    folded = len(calls_in(lambda: merge(model, "x")))
    unmerge(model)
    remove(model, "x")
    for number in range(30):
        put(model, LoRA(r=1), f"a{number}", train=False)
    assert len(calls_in(lambda: put(model, LoRA(r=1), "x", train=False))) == into
    assert len(calls_in(lambda: merge(model, "x"))) == folded
    unmerge(model)
    assert len(calls_in(lambda: remove(model, "x"))) == alone


def test_an_adapter_that_cannot_be_put_in_leaves_no_trace() -> None:
    model = tiny_llama()
    before = snapshot(model)
    config = LoRA(r=2)
    sites = resolve(model, config)
    with pytest.raises(KeyError):
        put_in(model, config, "a", sites, tensors={sites[0].path: {}})
    assert registry_of(model) is None
    assert same_state(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())
