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
from sidepath.kernels.linear import Layer, back, flat, forth, save, saved


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


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layers: Sequence[Layer], act: Activation, *factors: Tensor | None
    ) -> Tensor:
        (gate, up), first = forth(x, layers[:2])
        (y,), last = forth(act.forward(gate).mul_(up), layers[2:])
        kept, ctx.again = keep(x)
        save(ctx, layers, [*first, *last], [gate, up, *kept])
        ctx.act = act
        return y

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        layers, hiddens, (gate, up, *kept) = saved(ctx)
        act, x, gate_NH, up_NH = ctx.act, ctx.again(kept), flat(gate), flat(up)
        acted_NH = act.forward(gate_NH)
        into_NH = acted_NH * up_NH
        d_NH, of_down = back(layers[2:], [flat(dy)], into_NH, hiddens[2:], wanted=True, over=True)
        assert d_NH is not None
        dup_NH = acted_NH.mul_(d_NH)
        dgate_NH = act.back_(d_NH.mul_(up_NH), gate_NH)
        dx_NI, of_first = back(
            layers[:2], [dgate_NH, dup_NH], flat(x), hiddens[:2], wanted=ctx.needs_input_grad[0]
        )
        dx = None if dx_NI is None else dx_NI.view(x.shape)
        return dx, None, None, *of_first, *of_down


class _PlainMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layers: Sequence[Layer], act: Activation, *factors: Tensor | None
    ) -> Tensor:
        (inner,), first = forth(x, layers[:1])
        (y,), last = forth(act.forward(inner), layers[1:])
        kept, ctx.again = keep(x)
        save(ctx, layers, [*first, *last], [inner, *kept])
        ctx.act = act
        return y

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        layers, hiddens, (inner, *kept) = saved(ctx)
        act, x, inner_NH = ctx.act, ctx.again(kept), flat(inner)
        acted_NH = act.forward(inner_NH)
        d_NH, of_down = back(layers[1:], [flat(dy)], acted_NH, hiddens[1:], wanted=True, over=True)
        assert d_NH is not None
        d_NH = act.back_(d_NH, inner_NH)
        dx_NI, of_up = back(
            layers[:1], [d_NH], flat(x), hiddens[:1], wanted=ctx.needs_input_grad[0]
        )
        dx = None if dx_NI is None else dx_NI.view(x.shape)
        return dx, None, None, *of_up, *of_down
