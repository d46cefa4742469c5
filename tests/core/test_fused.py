"""When a module is computed in one piece and when not, and what is left of it afterwards."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sidepath.core.adapted import CHILD, SIBLINGS
from sidepath.core.fused import BLOCK, Block
from sidepath.injection.merging import merge, unmerge
from sidepath.injection.registry import require_registry
from sidepath.injection.surgery import activate, disabled, remove
from tests.conftest import outputs, randomise
from tests.core.kit import (
    FAMILIES,
    IDS,
    Calls,
    assert_fused_is_plain,
    assert_steps_equal,
    plainly,
    put,
    step,
    tiny,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_remove_gives_every_class_back(family: str) -> None:
    model = tiny(family)
    classes = {name: type(module) for name, module in model.named_modules()}
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    expected = step(model)
    put(model, "x")
    put(model, "y", targets=("mlp",))
    step(model)
    remove(model, "x")
    remove(model, "y")
    model.zero_grad()
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    found = step(model)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])


INNER = ("mlp.up_proj", "mlp.down_proj", "mlp.act_fn", "self_attn.q_proj", "self_attn.k_proj")


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("inner", [*INNER, "mlp", "input_layernorm"])
def test_hooks_on_modules_are_called(inner: str, kind: str) -> None:
    model = put(tiny())
    seen: list[nn.Module] = []
    module = model.get_submodule(f"model.layers.1.{inner}")
    register = getattr(module, f"register_{kind}_hook")
    handle = register(lambda module, *_: seen.append(module))
    found = step(model)
    assert seen == [module]
    handle.remove()
    assert_steps_equal(found, step(model), 1e-4)
    assert seen == [module]


@pytest.mark.filterwarnings("ignore:For backward hooks", "ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_all_modules_are_called(kind: str) -> None:
    model = put(tiny())
    wanted = {model.get_submodule(f"model.layers.1.{inner}") for inner in INNER}
    seen: list[nn.Module] = []
    register = getattr(nn.modules.module, f"register_module_{kind}_hook")
    handle = register(lambda module, *_: seen.append(module) if module in wanted else None)
    try:
        found = step(model)
    finally:
        handle.remove()
    assert set(seen) == wanted
    assert len(seen) == len(wanted)
    assert_steps_equal(found, step(model), 1e-4)


def test_a_hook_may_change_what_an_inner_module_gives() -> None:
    model = put(tiny())
    for inner in ("mlp.up_proj", "mlp.act_fn", "self_attn.v_proj"):
        before = model(IDS).logits
        module = model.get_submodule(f"model.layers.0.{inner}")
        handle = module.register_forward_hook(lambda module, args, y: y * 2)
        assert not torch.allclose(model(IDS).logits, before, atol=1e-5), inner
        assert_fused_is_plain(model)
        handle.remove()


def test_what_is_exchanged_after_injection_is_heeded() -> None:
    model = put(tiny())
    mlp, attention = model.model.layers[0].mlp, model.model.layers[1].self_attn
    before = outputs(model, IDS)
    mlp.act_fn = nn.Tanh()
    assert not torch.allclose(model(IDS).logits, before, atol=1e-4)
    assert_fused_is_plain(model)
    mlp.down_proj = nn.Linear(64, 32, bias=False)
    attention.k_proj = nn.Linear(32, 16, bias=False)
    assert_fused_is_plain(model)


def test_a_layer_whose_class_has_its_own_forward_is_asked() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = tiny()
    for name in ("mlp.gate_proj", "self_attn.q_proj", "self_attn.o_proj"):
        model.get_submodule(f"model.layers.0.{name}").__class__ = Doubled
    expected = model(IDS).logits
    put(model, trained=False)
    assert torch.equal(model(IDS).logits, expected)
    randomise(require_registry(model).adapters["x"].parameters(), 0.2)
    assert_fused_is_plain(model)


def test_a_parametrised_weight() -> None:
    """Its numbers are made anew at each call (`torch.nn.utils.parametrize`)."""

    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    model = tiny()
    for name in ("mlp.gate_proj", "self_attn.o_proj"):
        module = model.get_submodule(f"model.layers.0.{name}")
        nn.utils.parametrize.register_parametrization(module, "weight", Halved())
    expected = outputs(model, IDS)
    put(model, trained=False)
    assert torch.equal(model(IDS).logits, expected)
    randomise(require_registry(model).adapters["x"].parameters(), 0.2)
    assert_fused_is_plain(model)


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_autocast(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain forms run: autocast has its own say about dtypes."""
    model = put(tiny(family))
    calls = Calls(monkeypatch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = step(model)
        with plainly(model):
            expected = step(model)
    assert not calls.seen
    assert_steps_equal(found, expected, 1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing(dropout: float, reentrant: bool) -> None:
    model = put(tiny(), dropout=dropout)
    torch.manual_seed(5)
    expected = step(model)
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(5)
    assert_steps_equal(step(model), expected, 1e-4)


def test_a_deep_copy_is_independent() -> None:
    model = put(tiny())
    expected = step(model)
    other = copy.deepcopy(model)
    assert_steps_equal(step(other), expected, 1e-4)
    randomise(require_registry(other).adapters["x"].parameters(), 0.5)
    assert not torch.allclose(step(other)[0], expected[0])
    assert_fused_is_plain(other, 1e-3)  # larger factors: gradients cancel more
    activate(other, None)
    assert_steps_equal(step(model), expected, 1e-4)
    blocks = {module.__dict__.get(BLOCK) for module in model.modules()} - {None}
    copied = {module.__dict__.get(BLOCK) for module in other.modules()} - {None}
    assert len(blocks) == len(copied) == 9
    assert not blocks & copied
    ours = set(other.modules())
    assert all(block.module in ours for block in copied if isinstance(block, Block))


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_the_model_has_the_bases_classes_and_unmerged_it_is_fused_again(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(family)
    classes = {name: type(module) for name, module in model.named_modules()}
    put(model)
    expected, calls = step(model), Calls(monkeypatch)
    for _ in range(2):
        merge(model, "x")
        merged = {name: type(module) for name, module in model.named_modules()}
        assert all(merged[name] is cls for name, cls in classes.items())
        torch.testing.assert_close(model(IDS, labels=IDS).loss, expected[0])
        assert not calls.seen
        unmerge(model)
        assert_steps_equal(step(model), expected, 1e-5)
        assert set(calls.seen) == set(FAMILIES[family])
        calls.seen.clear()


def test_nothing_of_a_step_stays_behind_even_when_it_fails() -> None:
    model = put(tiny())
    attention = model.model.layers[0].self_attn
    kept: list[weakref.ref[Tensor]] = []

    def fail(module: nn.Module, args: Any) -> None:
        kept.append(weakref.ref(args[0]))
        raise RuntimeError("in between")

    step(model)
    handle = attention.v_proj.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in between"):
        model(IDS)
    handle.remove()

    class Failing(nn.Linear):
        forward = fail  # type: ignore[assignment]

    own = attention.v_proj.__class__
    attention.v_proj.__class__ = Failing
    with pytest.raises((RuntimeError, AttributeError)):
        model(IDS)
    attention.v_proj.__class__ = own
    gc.collect()
    assert all(ref() is None for ref in kept)
    copy.deepcopy(model)
    assert_fused_is_plain(model)


def test_without_an_adapter_that_answers_nothing_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    base = model(IDS).logits
    put(model)
    calls = Calls(monkeypatch)
    with disabled(model):
        assert torch.equal(model(IDS).logits, base)
    activate(model, None)
    assert torch.equal(model(IDS).logits, base)
    assert not calls.seen


def test_nothing_is_left_on_modules_beside_the_block() -> None:
    model = put(tiny())
    for module in model.modules():
        own = [name for name in module.__dict__ if name.startswith("_sidepath")]
        assert set(own) <= {BLOCK, SIBLINGS, "_sidepath_registry"}
    assert CHILD not in dict(model.model.layers[0].mlp.named_children())
