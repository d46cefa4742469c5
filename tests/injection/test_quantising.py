"""A 4-bit base under adapters: found, trained, merged and left exactly as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sidepath
from sidepath import LoRA
from sidepath.core.quant import is_packed, require_bitsandbytes
from sidepath.errors import MergeError, MissingExtra, TargetNotFound, UnsupportedModule
from sidepath.injection.quantising import dequantise_, quantise_, settle
from tests.conftest import outputs, randomise, tiny_bert, tiny_gpt2, tiny_llama

IDS = torch.tensor([[5, 9, 3, 17, 22], [1, 2, 3, 4, 5]])
MAKES = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def pointers(model: nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


def packed_paths(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if is_packed(module)]


@pytest.mark.parametrize("make", MAKES.values(), ids=list(MAKES))
def test_the_body_is_packed_and_the_rest_is_not(make: Callable[[], Any]) -> None:
    model, plain = make(), make()
    names = [name for name, _ in model.named_parameters()]
    paths = quantise_(model, dtype=torch.float32)
    assert paths == packed_paths(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert not any(part in path for path in paths for part in ("lm_head", "classifier"))
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not name.endswith(".bias"):
            assert torch.equal(parameter, plain.get_parameter(name))
    difference = (outputs(model, IDS) - outputs(plain, IDS)).abs().max()
    assert 0 < difference < 0.5 * outputs(plain, IDS).abs().max()
    assert quantise_(make(), exclude=("*.0.*",)) == [path for path in paths if ".0." not in path]


@pytest.mark.parametrize("make", MAKES.values(), ids=list(MAKES))
def test_dequantising_is_the_same_model(make: Callable[[], Any]) -> None:
    model, plain = make(), make()
    quantise_(model, dtype=torch.float32)
    before = outputs(model, IDS)
    paths = dequantise_(model)
    assert packed_paths(model) == []
    assert {path: type(model.get_submodule(path)) for path in paths} == {
        path: type(plain.get_submodule(path)) for path in paths
    }
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(outputs(model, IDS), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", MAKES.values(), ids=list(MAKES))
def test_the_base_is_never_changed(make: Callable[[], Any]) -> None:
    """Inject, train, save a state dict, merge, unmerge, remove: the same bytes all along."""
    model = make()
    quantise_(model)
    before, base, places = state(model), outputs(model, IDS), pointers(model)
    adapter = sidepath.inject(model, LoRA(r=2, alpha=4), "x")
    assert set(adapter.deltas) == set(packed_paths(model)), "found by themselves"
    assert torch.equal(outputs(model, IDS), base), "a fresh adapter changes no bit"
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05)
    for _ in range(2):
        model.train()
        model(input_ids=IDS)[0].float().square().mean().backward()
        assert all(p.grad is not None for p in adapter.parameters())
        assert not any(
            p.grad is not None for n, p in model.named_parameters() if "sidepath" not in n
        )
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        trained = outputs(model, IDS)
    assert not torch.equal(trained, base)
    with sidepath.disabled(model):
        assert torch.equal(outputs(model, IDS), base)
    for _ in range(3):
        sidepath.merge(model, "x")
        sidepath.unmerge(model)
    assert torch.equal(outputs(model, IDS), trained)
    sidepath.remove(model, "x")
    assert same(state(model), before)
    assert pointers(model) == places
    assert torch.equal(outputs(model, IDS), base)


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
def test_merging_goes_to_plain_weights_and_back(make: Callable[[], Any]) -> None:
    model = make()
    quantise_(model, dtype=torch.float32)
    bias: Any = "lora" if make is tiny_bert else "none"
    adapter = sidepath.inject(model, LoRA(r=2, bias=bias), "x")
    randomise(adapter.parameters())
    base = {path: model.get_submodule(path).weight for path in adapter.deltas}
    deltas: Mapping[str, Any] = adapter.deltas
    expected = {
        path: delta.merged(model.get_submodule(path).sidepath.view.matrix())
        for path, delta in deltas.items()
    }
    unmerged = outputs(model, IDS)
    sidepath.merge(model, "x")
    for path, W_OI in expected.items():
        weight = model.get_submodule(path).weight
        assert type(weight) is nn.Parameter
        assert not weight.requires_grad
        assert torch.equal(weight, W_OI)
    torch.testing.assert_close(outputs(model, IDS), unmerged, atol=2e-5, rtol=2e-5)
    assert not any("absmax" in name for name in model.state_dict())
    with sidepath.disabled(model):
        assert all(model.get_submodule(path).weight is weight for path, weight in base.items())
    sidepath.unmerge(model)
    assert all(model.get_submodule(path).weight is weight for path, weight in base.items())


def test_a_copy_of_a_merged_model_unmerges_alone() -> None:
    model = tiny_llama()
    quantise_(model)
    base = outputs(model, IDS)
    randomise(sidepath.inject(model, LoRA(r=2), "x").parameters())
    sidepath.merge(model, "x")
    twin = copy.deepcopy(model)
    sidepath.unmerge(model)
    sidepath.remove(model, "x")
    assert torch.equal(outputs(model, IDS), base)
    assert not torch.equal(outputs(twin, IDS), base)
    with sidepath.disabled(twin):
        assert torch.equal(outputs(twin, IDS), base)


def test_rows_are_routed_over_a_packed_base() -> None:
    model = tiny_llama()
    quantise_(model, dtype=torch.float32)
    base = outputs(model, IDS)
    randomise(sidepath.inject(model, LoRA(r=2), "a").parameters())
    alone = outputs(model, IDS)
    with sidepath.route(model, ["a", None]):
        mixed = outputs(model, IDS)
    assert torch.equal(mixed[1], base[1])
    torch.testing.assert_close(mixed[0], alone[0], atol=1e-5, rtol=1e-5)


def test_a_users_own_layer_is_held_while_adapters_are_on_it() -> None:
    bnb: Any = require_bitsandbytes()
    options = {"quant_type": "nf4", "compute_dtype": torch.float32}
    model: Any = nn.Sequential(bnb.nn.Linear4bit(96, 32, **options))
    model.to("cpu")
    before = dict(vars(model[0]))
    sidepath.inject(model, LoRA(r=2, targets=("0",)), "x")
    assert model[0].support_avx512bf16_for_cpu is False
    assert is_packed(model[0])
    sidepath.remove(model, "x")
    assert {**vars(model[0])} == before
    settle(model)
    assert model[0].support_avx512bf16_for_cpu is False
    sidepath.inject(model, LoRA(r=2, targets=("0",)), "x")
    sidepath.remove(model, "x")
    assert model[0].support_avx512bf16_for_cpu is False


# -- bad input ----------------------------------------------------------------------------------


def test_what_cannot_be_packed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedModule, match=r"(?s)14|torch.float64"):
        quantise_(tiny_llama().double())
    with pytest.raises(UnsupportedModule, match="no linear layer"):
        quantise_(nn.Sequential(nn.Embedding(3, 4)))
    model = tiny_llama()
    quantise_(model)
    with pytest.raises(UnsupportedModule, match="no linear layer"):
        quantise_(model)
    adapter = sidepath.inject(model, LoRA(r=2), "x")
    for verb in (quantise_, dequantise_):
        with pytest.raises(MergeError, match="while the model holds adapters"):
            verb(model)
    assert adapter.deltas
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match="sidepath"):
        quantise_(tiny_llama())


def test_other_quantised_layers_are_refused_by_name() -> None:
    bnb: Any = require_bitsandbytes()
    model = tiny_llama()
    for layer in model.model.layers:  # type: ignore[union-attr]
        eight = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
        layer.mlp.down_proj = eight.to("cpu")
    with pytest.raises(UnsupportedModule, match=r"(?s)Linear4bit.*down_proj \(Linear8bitLt\)"):
        sidepath.inject(model, LoRA(targets=("down_proj",)), "x")
    alone = nn.Sequential(eight)
    with pytest.raises(UnsupportedModule, match=r"Linear8bitLt"):
        sidepath.inject(alone, LoRA(), "x")
    with pytest.raises(TargetNotFound):
        sidepath.inject(nn.Sequential(nn.Embedding(3, 4)), LoRA(), "x")


def test_a_packed_module_is_not_trained_whole() -> None:
    model = tiny_llama()
    quantise_(model)
    with pytest.raises(
        UnsupportedModule, match=r"(?s)trained whole.*down_proj.weight: torch.uint8"
    ):
        sidepath.inject(model, LoRA(r=2, train_whole=("layers.1.mlp",)), "x")
