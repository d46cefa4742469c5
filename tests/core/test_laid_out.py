"""A base whose linear layers are laid out: the same products, and nothing left of it afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sidepath
from sidepath import LoRA
from sidepath.core import laid_out
from sidepath.core.adapted import CHILD
from sidepath.core.laid_out import LaidOut, lay_out, put_back, renew
from sidepath.core.pristine import pristine_copy
from sidepath.kernels import blocked
from sidepath.kernels.checked import Trials
from tests.conftest import randomise, tiny_gpt2, tiny_llama

pytestmark = pytest.mark.skipif(
    not blocked.lays_out(torch.ones(2, 2)), reason="no oneDNN of an x86 processor"
)
IDS = torch.randint(0, 64, (3, 7), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def forwards(model: nn.Module) -> list[object]:
    return [module.__dict__.get("forward") for module in model.modules()]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_every_linear_layer_is_laid_out_and_answers_the_same(make: Any, monkeypatch: Any) -> None:
    model = make().eval()
    expected, product = logits(model), blocked.product
    asked: list[Tensor] = []

    def counted(x: Tensor, laid: Tensor, bias: Tensor | None) -> Tensor:
        asked.append(x)
        return product(x, laid, bias)

    monkeypatch.setattr(blocked, "product", counted)
    lay_out(model)
    laid = [each for each in forwards(model) if isinstance(each, LaidOut)]
    linear = [m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    assert len(laid) == len(linear) > 0
    asked.clear()
    torch.testing.assert_close(logits(model), expected)
    assert len(asked) == len(linear)


def test_adapters_that_come_before_and_after_answer_the_same() -> None:
    targets = ("*.q_proj", "*.down_proj", "lm_head")

    def routed(laid: bool) -> Tensor:
        model: Any = tiny_llama().eval()
        sidepath.inject(model, LoRA(r=3, targets=targets), name="before")
        if laid:
            lay_out(model)
        sidepath.inject(model, LoRA(r=2, targets=targets), name="after")
        randomise(p for name, p in model.named_parameters() if CHILD in name)
        with sidepath.route(model, ["after", None, "before"]):
            return logits(model)

    torch.testing.assert_close(routed(laid=True), routed(laid=False))


def test_a_merge_is_seen_after_renew_though_it_wrote_into_the_same_memory() -> None:
    model: Any = tiny_llama().eval()
    for name in ("a", "b"):
        sidepath.inject(model, LoRA(r=3), name=name)
        randomise(p for n, p in model.named_parameters() if f"@{name}" in n)
    expected = {}
    for name in ("a", "b"):
        sidepath.merge(model, name)
        expected[name] = logits(model)
        sidepath.unmerge(model)
    assert (expected["a"] - expected["b"]).abs().max() > 0.01
    lay_out(model)
    for name in ("a", "b", "a"):
        sidepath.merge(model, name)
        renew(model)
        torch.testing.assert_close(logits(model), expected[name])
        sidepath.unmerge(model, keep=True)


def test_put_back_leaves_nothing_and_gradients_never_meet_it() -> None:
    model: Any = tiny_llama().eval()
    sidepath.inject(model, LoRA(r=3))
    before, expected = forwards(model), logits(model)
    lay_out(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert any(p.grad is not None for p in model.parameters())
    put_back(model)
    assert forwards(model) == before
    assert all(
        module._modules[CHILD].view.own_forward is None  # type: ignore[union-attr]
        for module in model.modules()
        if CHILD in module._modules
    )
    assert torch.equal(logits(model), expected)


def test_a_copy_is_a_layer_of_its_own() -> None:
    layer: Any = nn.Linear(6, 4)
    lay_out(layer)
    assert isinstance(layer.__dict__["forward"], LaidOut)
    twin = copy.deepcopy(layer)
    assert "forward" not in pristine_copy(layer).__dict__
    x = torch.ones(2, 6)
    with torch.no_grad():
        twin.weight.zero_()
        assert torch.equal(twin(x), twin.bias.expand(2, 4))
        torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)


def test_layers_that_are_called_in_another_way_are_left_alone() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    shadowed: Any = nn.Linear(3, 3)
    shadowed.forward = lambda x: x + 1
    model = nn.Sequential(Doubled(3, 3), shadowed, nn.Linear(3, 3).double(), nn.Conv1d(3, 3, 1))
    before = forwards(model)
    lay_out(model)
    assert forwards(model) == before


def test_a_product_that_disagrees_is_not_used(monkeypatch: Any) -> None:
    trials = Trials()
    monkeypatch.setattr(laid_out, "TRIALS", trials)
    monkeypatch.setattr(blocked, "product", lambda x, laid, bias: x @ torch.ones(6, 4))
    layer: Any = nn.Linear(6, 4)
    with pytest.warns(sidepath.errors.KernelNotice, match="blocked"):
        lay_out(layer)
    x = torch.ones(2, 6)
    with torch.no_grad():
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("rows", [(), (1,), (3,), (2, 5), (0,), (1, 0)])
def test_inputs_of_any_shape(rows: tuple[int, ...]) -> None:
    layer: Any = nn.Linear(6, 4)
    x = torch.randn(*rows, 6)
    with torch.no_grad():
        expected = layer(x)
        lay_out(layer)
        torch.testing.assert_close(layer(x), expected)
        turned = torch.randn(6, *rows).movedim(0, -1)
        torch.testing.assert_close(
            layer(turned), nn.functional.linear(turned, layer.weight, layer.bias)
        )
