"""Whole MLP blocks with side paths, in one piece of autograd each.

Gated: `y = D(f(G x) * U x)`. Plain: `y = D(f(U x))`. `G`, `U` and `D` are frozen linear layers,
each with a side path or without; `f` is element-wise. Only the block's input and what `f` and
the product are applied to are kept; both are computed again in the backward pass.

Dimensions: `...` any leading, N rows of all of them, I in and out, H hidden features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sidepath.kernels.activations import Activation
from sidepath.kernels.kept import keep
from sidepath.kernels.linear import Layer, back, factors, flat, forth


def gated_mlp(x: Tensor, gate: Layer, up: Layer, down: Layer, act: Activation) -> Tensor:
    """`D(f(G x) * U x)`, differentiable once, in `x` and the factors. Changes nothing in place."""
    return _apply(_GatedMLP, x, (gate, up, down), act)


def plain_mlp(x: Tensor, up: Layer, down: Layer, act: Activation) -> Tensor:
    """`D(f(U x))`, differentiable once, in `x` and the factors. Changes nothing in place."""
    return _apply(_PlainMLP, x, (up, down), act)


def _apply(
    block: type[torch.autograd.Function], x: Tensor, layers: Sequence[Layer], act: Activation
) -> Tensor:
    # Tensors that get gradients stand among the arguments themselves.
    factors = [tensor for layer in layers for tensor in (layer.A_RI, layer.B_OR)]
    result: Tensor = block.apply(x, layers, act, *factors)  # type: ignore[no-untyped-call]
    return result


class _Forth:
    """A block on its way forth: what each layer leaves for the way back."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self.own: list[Tensor | None] = []

    def through(self, number: int, x: Tensor) -> Tensor:
        """The output of one of the layers, in the order they stand in."""
        layer = self.layers[number]
        y, hidden_NR = forth(x, layer)
        self.own += [layer.A_RI, layer.B_OR, hidden_NR]
        return y

    def save(self, ctx: Any, x: Tensor, *inner: Tensor) -> None:
        """Keep the block's input, what lies inside, and what the layers left."""
        kept, ctx.again = keep(x)
        ctx.frozen = [(layer.base, layer.scaling) for layer in self.layers]
        ctx.save_for_backward(*self.own, *inner, *kept)


class _Back:
    """A block on its way back."""

    def __init__(self, ctx: Any, inner: int) -> None:
        own, rest = ctx.saved_tensors[: 3 * len(ctx.frozen)], ctx.saved_tensors[3 * len(ctx.frozen) :]
        self.layers = [
            Layer(base, A_RI, B_OR, scaling)
            for (base, scaling), A_RI, B_OR in zip(ctx.frozen, own[::3], own[1::3], strict=True)
        ]
        self.hidden = own[2::3]
        self.inner = [flat(tensor) for tensor in rest[:inner]]
        self.x = ctx.again(rest[inner:])
        self.gradients: list[Tensor | None] = [None] * (2 * len(self.layers))

    def through(
        self, number: int, dy_NO: Tensor, x_NI: Tensor, into_NI: Tensor | None = None
    ) -> Tensor:
        """`dx` of one of the layers; notes the gradients of its factors."""
        g_NR = self.factors(number, dy_NO, x_NI)
        return back(dy_NO, g_NR, self.layers[number], None, into_NI)

    def factors(self, number: int, dy_NO: Tensor, x_NI: Tensor) -> Tensor | None:
        """Notes the gradients of one layer's factors; returns that of `A x`."""
        found = factors(dy_NO, x_NI, self.hidden[number], self.layers[number])
        self.gradients[2 * number : 2 * number + 2] = found.dA_RI, found.dB_OR
        return found.g_NR


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layers: Sequence[Layer], act: Activation, *_: Tensor | None
    ) -> Tensor:
        block = _Forth(layers)
        gate, up = block.through(0, x), block.through(1, x)
        y = block.through(2, act.forward(gate).mul_(up))
        block.save(ctx, x, gate, up)
        ctx.act = act
        return y

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        block, act = _Back(ctx, inner=2), ctx.act
        x_NI, (gate_NH, up_NH) = flat(block.x), block.inner
        acted_NH = act.forward(gate_NH)
        d_NH = block.through(2, flat(dy), acted_NH * up_NH)
        dup_NH = acted_NH.mul_(d_NH)
        dgate_NH = act.back(d_NH.mul_(up_NH), gate_NH)
        del d_NH
        if not ctx.needs_input_grad[0]:
            block.factors(0, dgate_NH, x_NI)
            block.factors(1, dup_NH, x_NI)
            return None, None, None, *block.gradients
        dx_NI = block.through(0, dgate_NH, x_NI)
        dx_NI = block.through(1, dup_NH, x_NI, dx_NI)
        return dx_NI.view(block.x.shape), None, None, *block.gradients


class _PlainMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layers: Sequence[Layer], act: Activation, *_: Tensor | None
    ) -> Tensor:
        block = _Forth(layers)
        inner = block.through(0, x)
        y = block.through(1, act.forward(inner))
        block.save(ctx, x, inner)
        ctx.act = act
        return y

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        block = _Back(ctx, inner=1)
        x_NI, (inner_NH,) = flat(block.x), block.inner
        d_NH = block.through(1, flat(dy), ctx.act.forward(inner_NH))
        d_NH = ctx.act.back(d_NH, inner_NH)
        if not ctx.needs_input_grad[0]:
            block.factors(0, d_NH, x_NI)
            return None, None, None, *block.gradients
        return block.through(0, d_NH, x_NI).view(block.x.shape), None, None, *block.gradients
