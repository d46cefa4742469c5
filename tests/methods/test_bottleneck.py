"""Adapter layers against the papers' formulas written out, and their counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sidepath.errors import ConfigError, MergeError, TargetNotFound, UnsupportedModule
from sidepath.injection.merging import merge
from sidepath.injection.quantising import quantise_
from sidepath.injection.registry import registry_of, require_registry
from sidepath.injection.surgery import activate, remove, route
from sidepath.methods.base import Method
from sidepath.methods.bottleneck import Bottleneck
from sidepath.methods.lora import LoRA
from sidepath.methods.versatile import VersatileLM
from sidepath.store.adapter import inject, load
from sidepath.store.memory import switch_checkpointing
from tests.conftest import randomise
from tests.methods.architectures import ARCHITECTURES, inputs_of, logits_of


def written_out(tensors: dict[str, Tensor], h: Tensor, activation: Any, scale: float) -> Tensor:
    """What an adapter adds, one position and one number after another."""
    rows = []
    for vector in h.reshape(-1, h.shape[-1]):
        if "norm" in tensors:
            centred = vector - vector.mean()
            vector = centred / (centred.square().mean() + 1e-5).sqrt()
            vector = vector * tensors["norm"] + tensors["norm_bias"]
        down = zip(tensors["down"], tensors["down_bias"], strict=True)
        hidden = torch.stack([activation((row * vector).sum() + bias) for row, bias in down])
        up = zip(tensors["up"], tensors["up_bias"], strict=True)
        rows.append(torch.stack([scale * ((row * hidden).sum() + bias) for row, bias in up]))
    return torch.stack(rows).view(h.shape)


VARIANTS: dict[str, tuple[dict[str, Any], Any]] = {
    "houlsby": ({"kind": "houlsby"}, F.gelu),
    "pfeiffer": ({"kind": "pfeiffer"}, torch.relu),
    "lin": ({"kind": "lin"}, torch.relu),
    "silu": ({"kind": "pfeiffer", "activation": "silu", "scale": 4.0}, F.silu),
    "parallel": ({"kind": "pfeiffer", "parallel": True, "activation": "tanh"}, torch.tanh),
    "parallel lin": ({"kind": "lin", "parallel": True}, torch.relu),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixture"])
def test_each_variant_is_the_formula(variant: str, name: str) -> None:
    settings, activation = VARIANTS[variant]
    model, inputs = ARCHITECTURES[name](), inputs_of(name)
    config = Bottleneck(size=3, **settings)
    deltas = inject(model, config, "a").deltas
    assert len(deltas) == (4 if variant == "houlsby" else 2)
    randomise(require_registry(model).adapter("a").parameters())
    for path, delta in deltas.items():
        seen: dict[str, Any] = {}
        module = model.get_submodule(path)
        hook = module.register_forward_hook(
            lambda _, args, y, seen=seen: seen.update(x=args[0], adapted=y)
        )
        with torch.no_grad():
            logits_of(model, inputs)
        hook.remove()
        side: Any = require_registry(model).sides[path]
        with torch.no_grad():
            y = side.view(seen["x"])
            read = seen["x"] if config.parallel else y
            expected = y + written_out(delta.tensors(), read, activation, config.scale)
        assert torch.allclose(seen["adapted"], expected, atol=1e-5)
        assert not torch.allclose(seen["adapted"], y, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "t5", "mixture"])
@pytest.mark.parametrize("grad", [False, True])
def test_rows_are_routed_to_their_own(name: str, grad: bool) -> None:
    model, inputs = ARCHITECTURES[name](), inputs_of(name)
    for label, config in (
        ("a", Bottleneck(size=3)),
        ("b", VersatileLM(size=4)),
        ("c", LoRA(r=2, targets=("attention",))),
    ):
        inject(model, config, label)
        randomise(require_registry(model).adapter(label).parameters(), std=0.2)
    expected = []
    for row, answering in enumerate(("b", None, "a")):
        activate(model, answering)
        with torch.no_grad():
            expected.append(logits_of(model, inputs)[row])
    activate(model, None)
    with torch.set_grad_enabled(grad), route(model, ["b", None, "a"]):
        found = logits_of(model, inputs)
    assert torch.allclose(found, torch.stack(expected), atol=1e-5)
    assert not torch.allclose(expected[0], expected[2], atol=1e-3)
    # Experts multiply the tokens of all rows together: their sums are rounded another way.
    assert torch.equal(found[1], expected[1]) or name == "mixture"


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_dropped_blocks_stay_the_base_to_the_bit(name: str) -> None:
    model, inputs = ARCHITECTURES[name](), inputs_of(name)
    with torch.no_grad():
        before = model(**inputs, output_hidden_states=True)
    adapter = inject(model, Bottleneck(size=3, drop=1), "a")
    randomise(adapter.parameters())
    assert {int(next(p for p in path.split(".") if p.isdigit())) for path in adapter.deltas} == {1}
    with torch.no_grad():
        after = model(**inputs, output_hidden_states=True)
    key = "encoder_hidden_states" if name == "t5" else "hidden_states"
    assert torch.equal(after[key][1], before[key][1])
    assert not torch.equal(after[key][2], before[key][2])


def test_near_identity_starts_as_small_as_the_papers_say() -> None:
    model, inputs = ARCHITECTURES["bert"](), inputs_of("bert")
    with torch.no_grad():
        plain = logits_of(model, inputs)
    for kind, deviation in (("houlsby", 0.01), ("pfeiffer", 0.02), ("lin", 0.02)):
        config = Bottleneck(kind=kind, size=64, start="near-identity")  # type: ignore[arg-type]
        deltas = inject(model, config, kind).deltas.values()
        for name in ("down", "up"):
            numbers = torch.cat([delta.tensors()[name].flatten() for delta in deltas])
            # The truncated normal's deviation is 0.88 of the one it is cut from.
            expected = deviation * (0.8796 if kind == "houlsby" else 1.0)
            assert numbers.std().item() == pytest.approx(expected, rel=0.05)
            assert kind != "houlsby" or numbers.abs().max() <= 0.02
        assert not any(delta.tensors()["up_bias"].any() for delta in deltas)
        with torch.no_grad():
            change = logits_of(model, inputs) - plain
        assert 0 < change.abs().max() < 0.05


def test_adapters_in_float32_over_a_bfloat16_base_and_checkpointing() -> None:
    def gradients(checkpointing: bool) -> dict[str, Any]:
        model = ARCHITECTURES["llama"]().to(torch.bfloat16).train()
        torch.manual_seed(3)
        for label, config in (("a", Bottleneck(size=3)), ("b", VersatileLM(size=3))):
            deltas = inject(model, config, label).deltas
            randomise(require_registry(model).adapter(label).parameters())
        if checkpointing:
            switch_checkpointing(model, on=True)
        logits = model(**inputs_of("llama"), use_cache=False).logits
        assert logits.dtype == torch.bfloat16
        logits.float().square().mean().backward()
        return {
            f"{path}.{name}": parameter.grad
            for path, delta in deltas.items()
            for name, parameter in delta.named_parameters()
        }

    plain, recomputed = gradients(False), gradients(True)
    assert all(grad.dtype == torch.float32 and grad.any() for grad in plain.values())
    assert all(torch.equal(plain[key], recomputed[key]) for key in plain)


@pytest.mark.parametrize("name", ["mixture", "gpt2", "t5"])
def test_parallel_is_fresh_equal_and_saved(name: str, tmp_path: Path) -> None:
    model, inputs = ARCHITECTURES[name](), inputs_of(name)
    types = [type(module) for module in model.modules()]
    with torch.no_grad():
        plain = logits_of(model, inputs)
    config = Bottleneck(kind="pfeiffer", parallel=True, size=4, dtype="base", scale=4.0)
    adapter = inject(model, config, "a")
    with torch.no_grad():
        assert torch.equal(logits_of(model, inputs), plain)
    randomise(adapter.parameters())
    with torch.no_grad():
        expected = logits_of(model, inputs)
    adapter.save(tmp_path / "a")
    again = ARCHITECTURES[name]()
    loaded = load(again, tmp_path / "a")
    assert loaded.config == config
    with torch.no_grad():
        assert torch.equal(logits_of(again, inputs), expected)
    remove(model, "a")
    assert [type(module) for module in model.modules()] == types


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 0},
        {"scale": 0.0},
        {"drop": -1},
        {"parallel": True},
        {"kind": "pfeifer"},
        {"activation": "elu"},
    ],
)
def test_impossible_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        Bottleneck(**settings)
    assert any(next(iter(settings)) in fault for fault in caught.value.faults)


def test_all_faults_of_the_settings_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Bottleneck(size=0, scale=0.0, drop=-1, parallel=True)
    assert len(caught.value.faults) == 4


@pytest.mark.parametrize("name", ["bert", "opt", "deberta-v2"])
def test_a_shape_that_cannot_take_a_parallel_adapter_is_told_why(name: str) -> None:
    model = ARCHITECTURES[name]()
    with pytest.raises(UnsupportedModule, match="no module of its own") as caught:
        inject(model, Bottleneck("pfeiffer", parallel=True))
    assert len(caught.value.faults) == 2, "one a block"
    assert registry_of(model) is None


def test_more_blocks_dropped_than_there_are() -> None:
    for drop in (2, 3):
        with pytest.raises(TargetNotFound, match="the model has 2"):
            inject(ARCHITECTURES["bert"](), Bottleneck(drop=drop))


def test_what_stands_beside_matrices_only_refuses_a_whole_module() -> None:
    model = ARCHITECTURES["mixture"]()
    with pytest.raises(UnsupportedModule, match="lora stands beside a matrix"):
        inject(model, LoRA(targets=("mlp-output",)))
    assert registry_of(model) is None


@pytest.mark.parametrize("config", [Bottleneck(size=2), VersatileLM(size=2)])
def test_it_cannot_be_merged(config: Method) -> None:
    model, inputs = ARCHITECTURES["llama"](), inputs_of("llama")
    randomise(inject(model, config, "a").parameters())
    with torch.no_grad():
        expected = logits_of(model, inputs)
    with pytest.raises(MergeError, match="layers of its own"):
        merge(model, "a")
    with torch.no_grad():
        assert torch.equal(logits_of(model, inputs), expected), "nothing has changed"


@pytest.mark.parametrize("config", [Bottleneck(size=4), VersatileLM(size=4)])
def test_over_a_quantised_base(config: Method) -> None:
    pytest.importorskip("bitsandbytes")
    model, inputs = ARCHITECTURES["llama"](), inputs_of("llama")
    quantise_(model, dtype=torch.float32)
    with torch.no_grad():
        plain = logits_of(model, inputs)
    adapter = inject(model, config)
    with torch.no_grad():
        assert torch.equal(logits_of(model, inputs), plain)
    randomise(adapter.parameters())
    logits_of(model, inputs).square().sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.any() for parameter in adapter.parameters()
    )


def test_it_learns_and_generates_with_a_cache() -> None:
    """What is generated step by step is what one pass over the whole text says."""
    model = ARCHITECTURES["llama"]().train()
    adapter = inject(model, Bottleneck(size=8), "a")
    ids_BT = inputs_of("llama")["input_ids"]
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # A normed state and a head of small numbers: no loss far below this one is there to be had.
    assert losses[-1] < losses[0] - 0.2
    model.eval()
    made_BT = model.generate(ids_BT[:, :3], max_new_tokens=5, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        again_BT = model(input_ids=made_BT).logits.argmax(-1)
    assert torch.equal(made_BT[:, 3:], again_BT[:, 2:-1])
