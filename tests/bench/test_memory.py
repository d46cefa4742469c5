"""Bytes of a forward pass, counted by hand beside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sidepath.bench.memory import Memory, alive_between, peak_bytes, saved_bytes
from sidepath.bench.setting import Bench

FLOAT = 4


def linear() -> nn.Module:
    """Frozen, 4 in and 3 out."""
    return nn.Linear(4, 3).requires_grad_(False)


def test_what_exp_and_its_input_keep() -> None:
    """Of `exp(W x + b)` autograd keeps the result; the frozen `W` is resident, `x` not needed."""
    layer, x = linear(), torch.randn(5, 4, requires_grad=True)
    assert saved_bytes(layer, lambda: layer(x).exp().sum()) == 5 * 3 * FLOAT


def test_views_and_the_same_tensor_twice_count_once() -> None:
    layer, x = linear(), torch.randn(5, 4, requires_grad=True)

    def loss() -> Tensor:
        y = layer(x).exp()
        product: Tensor = y * y.view(3, 5).view(5, 3)
        return product.sum()

    assert saved_bytes(layer, loss) == 5 * 3 * FLOAT


def test_a_trained_layer_keeps_its_input_too() -> None:
    layer, x = linear().requires_grad_(True), torch.randn(5, 4) + 0
    assert saved_bytes(layer, lambda: layer(x).exp().sum()) == (5 * 3 + 5 * 4) * FLOAT


class Hides(torch.autograd.Function):
    """Keeps what it needs as an attribute, where autograd's hooks do not look."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = x * 3
        return x.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient: Tensor = gradients[0] * ctx.kept
        return gradient


def test_what_a_function_hides_is_seen_alive() -> None:
    layer, x = linear(), torch.randn(50, 40, requires_grad=True)

    def loss() -> Tensor:
        return Hides.apply(x)  # type: ignore[no-any-return, no-untyped-call]

    assert saved_bytes(layer, loss) == 0
    assert alive_between(layer, loss) == 50 * 40 * FLOAT + FLOAT


def test_the_peak_holds_what_both_passes_make_and_no_more() -> None:
    """Forward: `y`, `exp(y)`, the sum. Backward: the gradients of `y` and of `x`."""
    layer, x = linear(), torch.randn(50, 4, requires_grad=True)
    peak = peak_bytes(layer, lambda: layer(x).exp().sum())
    outputs, inputs = 50 * 3 * FLOAT, 50 * 4 * FLOAT
    assert 2 * outputs < peak <= 3 * outputs + inputs + 8 * FLOAT
    layer.requires_grad_(True)
    peak_bytes(layer, lambda: layer(x).exp().sum())
    assert all(own.grad is None for own in layer.parameters()), "the gradients are dropped"


def test_checkpointing_saves_memory(quick: Bench) -> None:
    def peaks(checkpointing: bool) -> Any:
        found = Memory("peak", "llama", "float32", 3, 8, checkpointing=checkpointing)("x", quick)
        return {way: spread.median for way, spread in found.ways.items()}

    plain, checkpointed = peaks(False), peaks(True)
    assert all(checkpointed[way] < plain[way] for way in ("ours", "floor"))


def test_saved_bytes_are_told_beside_all_that_is_alive(quick: Bench) -> None:
    found = Memory("saved", "llama", "float32", 3, 8)("x", quick)
    assert found.unit == "bytes"
    assert min(spread.median for spread in found.ways.values()) > 0
    assert found.ways["PEFT" if "PEFT" in found.ways else "full"].median > found.ways["ours"].median
    assert "alive between forward and backward" in found.notes[1]
