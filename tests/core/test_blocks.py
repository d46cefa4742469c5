"""Blocks in one piece, in whole models: fused against plain, and back again."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from sidepath.core.blocks import BLOCKS
from sidepath.core.fused import BLOCK, Block
from sidepath.core.quant import require_bitsandbytes
from sidepath.injection.merging import merge, unmerge
from sidepath.injection.quantising import quantise_
from sidepath.injection.surgery import route
from tests.conftest import outputs
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
        if isinstance(block := module.__dict__.get(BLOCK), Block)
    )
    assert taken == FAMILIES[family]
    for name in BLOCKS:
        path, _, cls = name.rpartition(".")
        assert isinstance(getattr(__import__(path, fromlist=[cls]), cls), type)


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
