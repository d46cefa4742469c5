"""Blocks in one piece, in whole models: fused against plain, and back again."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from sidepath.core.adapted import CHILD, SIBLINGS
from sidepath.core.blocks import _BLOCK, BLOCKS, Block
from sidepath.core.quant import require_bitsandbytes
from sidepath.injection.merging import merge, unmerge
from sidepath.injection.quantising import quantise_
from sidepath.injection.registry import require_registry
from sidepath.injection.surgery import activate, disabled, put_in, remove, route
from sidepath.injection.targets import resolve
from sidepath.methods.lora import LoRA
from tests.conftest import outputs, randomise

IDS = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(1))
FAMILIES = {
    "Llama": {"Norm": 5, "GatedMLP": 2, "Projections": 2},
    "Mistral": {"Norm": 5, "GatedMLP": 2, "Projections": 2},
    "Qwen2": {"Norm": 5, "GatedMLP": 2, "Projections": 2},
    "Qwen3": {"Norm": 9, "GatedMLP": 2, "Projections": 2},
    "SmolLM3": {"Norm": 5, "GatedMLP": 2, "Projections": 2},
    "Gemma": {"GatedMLP": 2, "Projections": 2},
    "Olmo2": {"GatedMLP": 2, "Projections": 2},
    "Phi": {"PhiMLP": 2, "Projections": 2},
    "GPT2": {"GPT2MLP": 2},
}
"""Which blocks of two layers are computed in one piece, by the name of the class that does."""


def tiny(family: str = "Llama", **options: Any) -> nn.Module:
    """A random model of a family: two layers, 32 wide, grouped-query attention where there is."""
    torch.manual_seed(7)
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family == "GPT2":
        config: Any = transformers.GPT2Config(**sizes, n_inner=64)
        config.resid_pdrop = config.attn_pdrop = config.embd_pdrop = 0.0
        config.update(options)
        return transformers.GPT2LMHeadModel(config).train()
    if family in {"Qwen3", "Gemma"}:
        sizes["head_dim"] = 8
    sizes |= {"intermediate_size": 64, "num_key_value_heads": 4 if family == "Phi" else 2}
    config = getattr(transformers, f"{family}Config")(**sizes | options)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.train()  # type: ignore[no-any-return]


def put(model: nn.Module, name: str = "x", *, trained: bool = True, **settings: Any) -> nn.Module:
    config = LoRA(**{"r": 3, **settings})
    installed = put_in(model, config, name, resolve(model, config))
    if trained:
        randomise(installed.parameters(), 0.2)
    activate(model, name)
    return model


@contextmanager
def plainly(model: nn.Module) -> Iterator[None]:
    routing = require_registry(model).routing
    routing.fused = False
    try:
        yield
    finally:
        routing.fused = True


class Calls:
    """Counts the fused passes of blocks, by kind, while it is entered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: Counter[str] = Counter()
        for kind in set(BLOCKS.values()):
            name = "answer" if kind.__name__ == "Projections" else "fused"
            monkeypatch.setattr(kind, name, self._counting(kind.__name__, getattr(kind, name)))

    def _counting(self, kind: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(block: Any, *args: Any) -> Any:
            y = method(block, *args)
            if y is not None and type(block).__name__ == kind:
                self.seen[kind] += 1
            return y

        return counted


def step(model: nn.Module, ids: Tensor = IDS) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss, and its gradients by name."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_steps_equal(
    found: tuple[Tensor, dict[str, Tensor]],
    expected: tuple[Tensor, dict[str, Tensor]],
    tolerance: float,
) -> None:
    """Gradients may differ by so much of their largest number."""
    torch.testing.assert_close(found[0], expected[0], atol=tolerance, rtol=tolerance)
    assert found[1].keys() == expected[1].keys()
    assert found[1]
    for name, gradient in found[1].items():
        wanted = expected[1][name]
        largest = float(wanted.abs().max())
        assert largest > 0, name
        torch.testing.assert_close(
            gradient, wanted, rtol=0, atol=tolerance * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_fused_is_plain(model: nn.Module, tolerance: float = 1e-4) -> None:
    torch.manual_seed(3)
    found = step(model)
    with plainly(model):
        torch.manual_seed(3)
        expected = step(model)
    assert_steps_equal(found, expected, tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_is_plain(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients in float32; each block was computed in one piece, and not when plain."""
    model = put(tiny(family))
    calls = Calls(monkeypatch)
    found = step(model)
    # The first norm's input needs no gradient; of three projections each is answered for.
    expected = {
        kind: {"Norm": count - 1, "Projections": 3 * count}.get(kind, count)
        for kind, count in FAMILIES[family].items()
    }
    assert calls.seen == expected
    with plainly(model):
        assert_steps_equal(found, step(model), 1e-4)
    assert calls.seen == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family: str) -> None:
    """How far gradients are from those in float32: on average over models no further than twice
    the plain form's distance (measured over eight models each: 0.7 to 1.5 times).
    """
    distances = {"fused": 0.0, "plain": 0.0}
    for seed in range(4):
        model = tiny(family)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data.normal_(std=parameter.shape[1] ** -0.5)
        model.get_input_embeddings().weight.data.normal_()
        put(model.bfloat16(), dtype="base")
        wide = copy.deepcopy(model).float()
        with plainly(wide), plainly(model):
            exact, plain = step(wide), step(model)
        fused = step(model)
        torch.testing.assert_close(fused[0].float(), exact[0], atol=0.05, rtol=0.01)
        assert fused[1].keys() == exact[1].keys()
        distances["fused"] += distance(fused[1], exact[1])
        distances["plain"] += distance(plain[1], exact[1])
    assert distances["fused"] < 2 * distances["plain"]


def distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """How far gradients are off in the mean, over their size."""
    off = [float((g.float() - exact[n]).norm() / exact[n].norm()) for n, g in found.items()]
    return sum(off) / len(off)


@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32])
def test_factors_of_another_dtype_than_the_base(factors: torch.dtype) -> None:
    """The products run in the base's dtype: in float32 bfloat16 factors lose nothing."""
    model = put(tiny().float(), dtype="bfloat16" if factors == torch.bfloat16 else "float32")
    other = copy.deepcopy(model).float()
    found, (loss, gradients) = step(model), step(other)
    rounded = {name: gradient.to(factors) for name, gradient in gradients.items()}
    assert all(gradient.dtype == factors for gradient in found[1].values())
    assert_steps_equal(found, (loss, rounded), 1e-5 if factors == torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_injection_leaves_the_bits(family: str, dtype: torch.dtype) -> None:
    model = tiny(family).to(dtype)
    expected = model(IDS).logits
    put(model, trained=False)
    assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(outputs(model, IDS), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_which_blocks_are_taken(family: str) -> None:
    """None less when a class of transformers gets another name: then this fails."""
    model = put(tiny(family))
    taken = Counter(
        type(block).__name__
        for module in model.modules()
        if isinstance(block := module.__dict__.get(_BLOCK), Block)
    )
    assert taken == FAMILIES[family]
    for name in BLOCKS:
        path, _, cls = name.rpartition(".")
        assert isinstance(getattr(__import__(path, fromlist=[cls]), cls), type)


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


@pytest.mark.parametrize(
    "settings",
    [
        {"targets": ("q_proj", "v_proj")},
        {"targets": ("gate_proj", "o_proj")},
        {"targets": ("down_proj",), "layers": (1,)},
        {"targets": ("mlp",), "bias": "all"},
        {"dropout": 0.4},
        {"targets": ("q_proj", "k_proj", "v_proj"), "rank_pattern": {"k_proj": 1}},
        {"train_whole": ("norm",)},
        {"targets": ("all-linear",), "train_whole": ("layers.0.mlp.up_proj",),
         "exclude": ("layers.0.mlp.up_proj",)},
    ],
    ids=str,
)  # fmt: skip
def test_adapters_of_some_layers_and_other_kinds(settings: dict[str, Any]) -> None:
    """With dropout the two draw other masks: then only that it acts, and in training alone."""
    model = put(tiny("Llama", mlp_bias=True, attention_bias=True), **settings)
    if "dropout" not in settings:
        assert_fused_is_plain(model)
        return
    torch.manual_seed(0)
    one, again = step(model), (torch.manual_seed(0), step(model))[1]
    assert torch.equal(one[0], again[0])
    assert all(torch.equal(one[1][name], again[1][name]) for name in one[1])
    assert not torch.equal(one[0], step(model)[0])
    model.eval()
    assert_fused_is_plain(model)


def test_dropout_in_fused_layers_is_dropout_on_average() -> None:
    """Over many masks the mean of one layer's output is the output without a mask."""
    model = put(tiny(), dropout=0.3)
    layer, x = model.get_submodule("model.layers.0.mlp.up_proj"), torch.randn(4, 32)
    mean = torch.stack([layer(x).detach() for _ in range(3000)]).mean(0)
    layer.eval()
    expected = layer(x).detach()
    spread = torch.stack([outputs(layer.train(), x) for _ in range(200)]).std(0)
    assert float(((mean - expected).abs() / (spread / 3000**0.5 + 1e-6)).max()) < 6


def test_base_weights_that_are_thawed_get_gradients() -> None:
    model = put(tiny())
    thawed = ("mlp.up_proj.weight", "self_attn.k_proj.weight", "input_layernorm.weight")
    for name, parameter in model.named_parameters():
        if name.endswith(thawed) or name == "model.norm.weight":
            parameter.requires_grad_()
    assert_fused_is_plain(model)
    _, gradients = step(model)
    assert sum(name.endswith((*thawed, "model.norm.weight")) for name in gradients) == 7


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
    blocks = {module.__dict__.get(_BLOCK) for module in model.modules()} - {None}
    copied = {module.__dict__.get(_BLOCK) for module in other.modules()} - {None}
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


def test_siblings_asked_on_another_input() -> None:
    model = put(tiny())
    attention = model.model.layers[0].self_attn
    for order in ("qkv", "kqv", "vkq", "qqk"):
        xs = [torch.randn(2, 4, 32, requires_grad=True) for _ in order]
        layers = [getattr(attention, f"{letter}_proj") for letter in order]
        found = [layer(x) for layer, x in zip(layers, xs, strict=True)]
        with plainly(model):
            expected = [layer(x) for layer, x in zip(layers, xs, strict=True)]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            torch.autograd.grad(sum(y.square().sum() for y in found), xs),
            torch.autograd.grad(sum(y.square().sum() for y in expected), xs),
            atol=1e-2,
            rtol=1e-4,
        )


def test_siblings_asked_twice_see_what_changed_in_between() -> None:
    model = put(tiny())
    attention, x = model.model.layers[0].self_attn, torch.randn(2, 4, 32)
    attention.q_proj(x)
    x.mul_(2)
    with plainly(model):
        expected = attention.k_proj(x)
    torch.testing.assert_close(attention.k_proj(x), expected)
    attention.q_proj(x)
    randomise(attention.v_proj.parameters(), 0.5)
    with plainly(model):
        expected = attention.v_proj(x)
    torch.testing.assert_close(attention.v_proj(x), expected)


@pytest.mark.parametrize("asked", ["q", "qk", "kv", "qkv"])
def test_siblings_that_are_never_asked_leak_nothing(asked: str) -> None:
    model = put(tiny())
    attention = model.model.layers[0].self_attn
    x = torch.randn(2, 4, 32, requires_grad=True)
    for letter in asked:
        getattr(attention, f"{letter}_proj")(x).sum().backward()
    dead = weakref.ref(x)
    del x
    gc.collect()
    assert dead() is None


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
        forward = fail

    own = attention.v_proj.__class__
    attention.v_proj.__class__ = Failing
    with pytest.raises((RuntimeError, AttributeError)):
        model(IDS)
    attention.v_proj.__class__ = own
    gc.collect()
    assert all(ref() is None for ref in kept)
    copy.deepcopy(model)
    assert_fused_is_plain(model)


def test_routed_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row has side paths of its own, so that only the norms are fused."""
    model = tiny()
    for name in ("a", "b"):
        put(model, name)
    calls = Calls(monkeypatch)
    with route(model, ["a", "b", None]):
        found = step(model)
        assert set(calls.seen) == {"Norm"}
        with plainly(model):
            assert_steps_equal(found, step(model), 1e-4)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_base(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    require_bitsandbytes()
    model = tiny().to(dtype)
    quantise_(model, dtype=dtype)
    put(model.train())
    calls = Calls(monkeypatch)
    expected = step(model)
    assert set(calls.seen) == {"Norm", "GatedMLP", "Projections"}
    if dtype == torch.float32:
        assert_fused_is_plain(model)
    with plainly(model):
        plain = step(model)
    ours, theirs = (torch.cat([g.flatten() for g in s[1].values()]) for s in (expected, plain))
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.98
    merge(model, "x")
    unmerge(model)
    calls.seen.clear()
    assert_steps_equal(step(model), expected, 1e-6)
    assert set(calls.seen) == {"Norm", "GatedMLP", "Projections"}


def test_a_norms_output_may_be_changed_before_the_layer_sees_it() -> None:
    model = put(tiny())
    for norm in ("input_layernorm", "post_attention_layernorm"):
        module = model.model.layers[1].get_submodule(norm)
        handle = module.register_forward_hook(lambda module, args, y: y.mul_(1.5))
        assert_fused_is_plain(model)
        handle.remove()


def test_nothing_is_left_on_modules_beside_the_block() -> None:
    model = put(tiny())
    for module in model.modules():
        own = [name for name in module.__dict__ if name.startswith("_sidepath")]
        assert set(own) <= {_BLOCK, SIBLINGS, "_sidepath_registry"}
    assert CHILD not in dict(model.model.layers[0].mlp.named_children())
