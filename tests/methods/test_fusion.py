"""AdapterFusion against its formula, and the adapters it must find."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from sidepath.errors import AdapterError, ConfigError, DamagedAdapter, UnknownAdapter, WrongBase
from sidepath.injection.registry import registry_of, require_registry
from sidepath.injection.surgery import activate, remove, route
from sidepath.methods.bottleneck import AdapterLayer, Bottleneck
from sidepath.methods.fusion import AdapterFusion, Fusion
from sidepath.methods.lora import LoRA
from sidepath.store.adapter import Adapter, inject, load
from sidepath.store.plan import plan
from tests.conftest import randomise
from tests.methods.architectures import ARCHITECTURES, inputs_of, logits_of

PFEIFFER = Bottleneck("pfeiffer", size=4)


def with_adapters(name: str, *labels: str, config: Bottleneck = PFEIFFER) -> Any:
    """The model with trained adapters of these names on it."""
    model = ARCHITECTURES[name]()
    for seed, label in enumerate(labels):
        torch.manual_seed(seed)
        adapter = inject(model, config, label)
        randomise(adapter.parameters(), std=0.3)
    return model


def fused(model: nn.Module, *labels: str, **settings: Any) -> Adapter:
    return inject(model, AdapterFusion(adapters=labels, **settings), "f")


def answer(model: nn.Module, name: str, active: str | None = "f") -> Tensor:
    activate(model, active)
    with torch.no_grad():
        return logits_of(model, inputs_of(name))


def written_out(fusion: Fusion, h_D: Tensor, z_ND: list[Tensor]) -> Tensor:
    """What a fusion adds at one position."""
    query = fusion.query @ h_D + fusion.query_bias
    scores = [query @ (fusion.key @ z + fusion.key_bias) for z in z_ND]
    total = sum(score.exp() for score in scores)
    parts = [s.exp() / total * (fusion.value @ z) for s, z in zip(scores, z_ND, strict=True)]
    return torch.stack(parts).sum(0)


@pytest.mark.parametrize("name", ["llama", "t5", "mixture", "bert"])
def test_a_fusion_is_the_formula(name: str) -> None:
    model = with_adapters(name, "a", "b", "c")
    deltas = fused(model, "a", "b", "c").deltas
    randomise(require_registry(model).adapter("f").parameters(), std=0.05)
    assert [len(deltas), *map(type, deltas.values())][1:] == [Fusion] * len(deltas)
    for path, fusion in deltas.items():
        assert isinstance(fusion, Fusion)
        seen: dict[str, Any] = {}
        hook = model.get_submodule(path).register_forward_hook(
            lambda _, args, y, seen=seen: seen.update(x=args[0], adapted=y)
        )
        answer(model, name)
        hook.remove()
        side: Any = require_registry(model).sides[path]
        with torch.no_grad():
            y = side.view(seen["x"])
            zs = [side.get(label).update(y) for label in "abc"]
            at = (0, -1) if y.dim() == 3 else (0,)
            expected = y[at] + written_out(fusion, y[at], [z[at] for z in zs])
        assert torch.allclose(seen["adapted"][at], expected, atol=1e-5)


def test_one_adapter_gives_v_z_and_the_residual() -> None:
    model = with_adapters("llama", "a")
    alone = answer(model, "llama", "a")
    fusions: list[Any] = list(fused(model, "a").deltas.values())
    with torch.no_grad():
        for fusion in fusions:
            fusion.value.copy_(torch.eye(32))
            randomise(iter((fusion.query, fusion.key)))
    assert torch.allclose(answer(model, "llama"), alone, atol=1e-5), "V = 1: the adapter itself"
    fusion, h, z = fusions[0], torch.randn(5, 32), torch.randn(5, 1, 32)
    randomise(fusion.parameters())
    assert torch.allclose(fusion.composition(h, z), z[:, 0] @ fusion.value.T, atol=1e-6)


def test_equal_keys_and_the_identity_give_the_plain_mean() -> None:
    model = with_adapters("llama", "a", "b", "c")
    fusion = next(iter(fused(model, "a", "b", "c").deltas.values()))
    assert isinstance(fusion, Fusion)
    off = fusion.value - torch.eye(32)
    assert torch.allclose(off, 1e-6 * (1 - torch.eye(32)), atol=1e-9)
    assert fusion.query.std().item() == pytest.approx(0.02, rel=0.2)
    assert not fusion.query_bias.any()
    with torch.no_grad():
        fusion.value.copy_(torch.eye(32))
        fusion.key.zero_()
    h, z = torch.randn(5, 32), torch.randn(5, 3, 32)
    assert torch.allclose(fusion.composition(h, z), z.mean(1), atol=1e-6)


def test_the_papers_count() -> None:
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig(vocab_size=8))
    assert plan(model, AdapterFusion(), batch_size=1, tokens=2).trainable == 21_252_096
    planned = plan(model, AdapterFusion(adapters=("a", "b")), batch_size=1, tokens=2)
    assert planned.trainable == 12 * (3 * 768**2 + 2 * 768) == 21_252_096
    assert planned.memory.activations is None, "what the adapters hold is not known there"


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_gradients_reach_the_fusion_and_not_its_adapters(name: str) -> None:
    model = with_adapters(name, "a", "b")
    adapter = fused(model, "a", "b")
    randomise(adapter.parameters())
    logits_of(model, inputs_of(name)).square().sum().backward()
    # A key's bias moves every adapter's score alike, which the softmax takes out again.
    trained = dict(next(iter(adapter.deltas.values())).named_parameters())
    assert set(trained) == {"query", "query_bias", "key", "key_bias", "value"}
    own = {id(parameter) for parameter in adapter.parameters()}
    for path, delta in adapter.deltas.items():
        for local, parameter in delta.named_parameters():
            moved = parameter.grad is not None and parameter.grad.any()
            assert local == "key_bias" or moved, (path, local)
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)


def saved(tmp_path: Path, name: str = "llama", config: Bottleneck = PFEIFFER) -> Tensor:
    """Folders of two adapters and of a fusion over them, and what it answers."""
    model = with_adapters(name, "a", "b", config=config)
    targets = ("mlp-output",) if config is PFEIFFER else ("attention-output", "mlp-output")
    randomise(fused(model, "a", "b", targets=targets).parameters())
    for label in ("a", "b", "f"):
        Adapter(label, model).save(tmp_path / label)
    return answer(model, name)


@pytest.mark.parametrize(
    ("name", "config"), [("llama", PFEIFFER), ("t5", Bottleneck(size=3)), ("mixture", PFEIFFER)]
)
def test_saved_and_loaded_it_answers_alike(name: str, config: Bottleneck, tmp_path: Path) -> None:
    expected = saved(tmp_path, name, config)
    model = ARCHITECTURES[name]()
    for label in ("b", "a", "f"):
        load(model, tmp_path / label)
    assert torch.equal(answer(model, name), expected)
    remove(model, "f")
    remove(model, "b")
    remove(model, "a")
    assert registry_of(model) is None


def test_loaded_without_its_adapters_it_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    saved(tmp_path)
    model = ARCHITECTURES["llama"]()
    with pytest.raises(AdapterError) as caught:
        load(model, tmp_path / "f")
    assert [fault[:3] for fault in caught.value.faults] == ['"a"', '"b"']
    assert registry_of(model) is None


def test_loaded_beside_others_of_the_same_names_it_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    model = ARCHITECTURES["llama"]()
    load(model, tmp_path / "a")
    load(model, tmp_path / "a", "b")
    with pytest.raises(AdapterError) as caught:
        load(model, tmp_path / "f")
    assert len(caught.value.faults) == 2, "one a place"
    assert all(
        fault.startswith('"b"') and "is not the one that was composed" in fault
        for fault in caught.value.faults
    )
    assert list(require_registry(model).adapters) == ["a", "b"]


def test_one_bit_of_an_adapter_is_enough(tmp_path: Path) -> None:
    saved(tmp_path)
    model = ARCHITECTURES["llama"]()
    load(model, tmp_path / "a")
    layer = next(iter(load(model, tmp_path / "b").deltas.values()))
    assert isinstance(layer, AdapterLayer)
    with torch.no_grad():
        layer.up.view(torch.int32)[3, 1] ^= 1
    with pytest.raises(AdapterError, match=r'"b".*is not the one'):
        load(model, tmp_path / "f")


def test_another_base_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    other = ARCHITECTURES["llama"]()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    for label in ("a", "f"):
        with pytest.raises(WrongBase):
            load(other, tmp_path / label)
    for label in ("a", "b"):
        load(other, tmp_path / label, allow_other_base=True)
    with pytest.raises(WrongBase):
        load(other, tmp_path / "f")


def test_a_damaged_fusion_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    shutil.copy(tmp_path / "a" / "adapter_model.safetensors", tmp_path / "f")
    model = ARCHITECTURES["llama"]()
    for label in ("a", "b"):
        load(model, tmp_path / label)
    with pytest.raises(DamagedAdapter):
        load(model, tmp_path / "f")


def test_every_adapter_that_is_amiss_is_named_at_once() -> None:
    model = with_adapters("llama", "a")
    inject(model, Bottleneck("pfeiffer", size=4, drop=1), "dropped")
    inject(model, LoRA(r=2, targets=("down_proj",)), "lora")
    with pytest.raises(AdapterError) as caught:
        fused(model, "a", "absent", "dropped", "lora")
    text = "\n".join(caught.value.faults)
    assert text.count('"absent"') == text.count('"dropped"') == 1
    assert text.count("LowRank") == 2
    assert '"a"' not in text
    assert "f" not in require_registry(model).adapters
    fused(model, "a", "dropped", drop=1)


def test_an_adapter_taken_away_is_missed() -> None:
    model = with_adapters("llama", "a", "b")
    fused(model, "a", "b")
    remove(model, "b")
    with pytest.raises(UnknownAdapter, match="found: a, f\n  expected: a, b"):
        answer(model, "llama")
    answer(model, "llama", "a")


def test_rows_are_routed_to_a_fusion() -> None:
    model = with_adapters("llama", "a", "b")
    randomise(fused(model, "a", "b").parameters())
    expected = [answer(model, "llama", label)[row] for row, label in enumerate(("a", "f", None))]
    with torch.no_grad(), route(model, ["a", "f", None]):
        found = logits_of(model, inputs_of("llama"))
    assert torch.allclose(found, torch.stack(expected), atol=1e-5)


def test_parallel_adapters_are_composed_where_they_stand() -> None:
    config = Bottleneck("pfeiffer", size=4, parallel=True)
    model = with_adapters("gpt2", "a", config=config)
    alone = answer(model, "gpt2", "a")
    fusions: Iterable[Any] = fused(model, "a", targets=("mlp-module",)).deltas.values()
    for fusion in fusions:
        with torch.no_grad():
            fusion.value.copy_(torch.eye(32))
    assert torch.allclose(answer(model, "gpt2"), alone, atol=1e-5)


def test_without_names_it_composes_every_bottleneck_that_stands_there(tmp_path: Path) -> None:
    model = with_adapters("llama", "b", "v1.0", "a")
    inject(model, LoRA(r=2, targets=("down_proj",)), "no-bottleneck")
    inject(model, Bottleneck("pfeiffer", size=4, parallel=True), "elsewhere")
    adapter = fused(model)
    assert adapter.config == AdapterFusion(adapters=("b", "v1.0", "a"))
    randomise(adapter.parameters())
    expected = answer(model, "llama")
    again = ARCHITECTURES["llama"]()
    for label in ("a", "b", "v1.0", "f"):
        load(again, Adapter(label, model).save(tmp_path / label))
    assert torch.equal(answer(again, "llama"), expected)


def test_without_names_and_without_bottlenecks_it_says_so() -> None:
    model = ARCHITECTURES["llama"]()
    inject(model, LoRA(r=2, targets=("down_proj",)), "lora")
    with pytest.raises(AdapterError, match="no bottleneck adapter stands") as caught:
        fused(model)
    assert "mlp-output" in str(caught.value)
    assert list(require_registry(model).adapters) == ["lora"]


@pytest.mark.parametrize(
    "settings", [{"adapters": ("a", "a")}, {"targets": ()}, {"regularise": -1.0}]
)
def test_impossible_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        AdapterFusion(**settings)
