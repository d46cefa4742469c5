"""A frozen linear layer and its side path in one piece of autograd.

    y = W0 x + b + s B (A x)        g = s dy B        dx = dy W0 + g A
    dA = g^T x                      dB = s dy^T (A x)

The low-rank product is added in place into the base's output, and its gradient into `dx`; no
gradient of `W0` exists. For the backward pass `x` is kept once, whoever else keeps it, and
`A x`, which is r numbers a row. All products run in `x`'s dtype, whatever the factors are kept
in, so that no float32 copy of an activation is made; each is accumulated in float32 and rounded
once. The plain form is `kernels.lowrank`.

Dimensions: `...` any leading, N rows of all of them, I in, O out, R rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sidepath.kernels.dropout import Mask
from sidepath.kernels.kept import keep


class FrozenLinear(Protocol):
    """A linear layer without gradients of its own."""

    def __call__(self, x: Tensor) -> Tensor:
        """`W0 x + b`, a new tensor."""
        ...

    def back(self, dy_NO: Tensor, into_NI: Tensor | None = None) -> Tensor:
        """`dy W0`; where `into` is given, that plus it, in place."""
        ...


class Layer(NamedTuple):
    """A frozen linear layer and the side path beside it, if there is one."""

    base: FrozenLinear
    A_RI: Tensor | None = None
    B_OR: Tensor | None = None
    scaling: float = 1.0


def flat(x: Tensor) -> Tensor:
    """All leading dimensions as one."""
    return x.reshape(-1, x.shape[-1])


def forth(x: Tensor, layer: Layer, mask: Mask | None = None) -> tuple[Tensor, Tensor | None]:
    """`W0 x + b + s B (A x)`, and `A x` as (N, R), which the way back needs."""
    base, A_RI, B_OR, scaling = layer
    y = base(x)
    if A_RI is None or B_OR is None:
        return y, None
    y, x_NI = y.contiguous(), x.reshape(-1, x.shape[-1])
    if mask is not None:
        x_NI = mask.on(x_NI)
    hidden_NR = x_NI @ A_RI.to(x.dtype).T
    y.view(-1, y.shape[-1]).addmm_(hidden_NR, B_OR.to(x.dtype).T, alpha=scaling)
    return y, hidden_NR


class Gradients(NamedTuple):
    """What reaches a side path from above."""

    g_NR: Tensor | None = None
    """`s dy B`, the gradient of `A x`."""
    dA_RI: Tensor | None = None
    dB_OR: Tensor | None = None


def factors(
    dy_NO: Tensor, x_NI: Tensor, hidden_NR: Tensor | None, layer: Layer, mask: Mask | None = None
) -> Gradients:
    """The gradients of a layer's side path, those of `A` and `B` in their own dtypes."""
    _, A_RI, B_OR, scaling = layer
    if A_RI is None or B_OR is None or hidden_NR is None:
        return Gradients()
    g_NR = (dy_NO @ B_OR.to(dy_NO.dtype)).mul_(scaling)
    if not (A_RI.requires_grad or B_OR.requires_grad):
        return Gradients(g_NR)
    dA_RI = g_NR.T @ (x_NI if mask is None else mask.on(x_NI))
    # As (R, O): the other way round, (O, R), takes twice the time.
    dB_RO = (hidden_NR.T @ dy_NO).mul_(scaling)
    return Gradients(g_NR, dA_RI.to(A_RI.dtype), dB_RO.T.to(B_OR.dtype))


def back(
    dy_NO: Tensor,
    g_NR: Tensor | None,
    layer: Layer,
    mask: Mask | None = None,
    into_NI: Tensor | None = None,
) -> Tensor:
    """`dx` of a layer; where `into` is given, that plus it, in place."""
    dx_NI = layer.base.back(dy_NO, into_NI)
    if g_NR is None or layer.A_RI is None:
        return dx_NI
    A_RI = layer.A_RI.to(dy_NO.dtype)
    return dx_NI.addmm_(g_NR, A_RI) if mask is None else dx_NI.add_(mask.on(g_NR @ A_RI))


class SidePathLinear(torch.autograd.Function):
    """`W0 x + b + s B (A x)`, differentiable once, in `x`, `A` and `B`.

    Called as `SidePathLinear.apply(x, A, B, layer, mask)`, with the layer's own `A` and `B`. With
    a mask the side path sees `mask.on(x)`; the mask is drawn again on the way back.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A_RI: Tensor, B_OR: Tensor, layer: Layer, mask: Mask | None
    ) -> Tensor:
        y, hidden_NR = forth(x, layer, mask)
        kept, ctx.again = keep(x)
        ctx.save_for_backward(A_RI, B_OR, hidden_NR, *kept)
        ctx.base, ctx.scaling, ctx.mask = layer.base, layer.scaling, mask
        return y

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        A_RI, B_OR, hidden_NR, *kept = ctx.saved_tensors
        layer = Layer(ctx.base, A_RI, B_OR, ctx.scaling)
        x, dy_NO, mask = ctx.again(kept), flat(dy), ctx.mask
        g_NR, dA_RI, dB_OR = factors(dy_NO, flat(x), hidden_NR, layer, mask)
        dx = back(dy_NO, g_NR, layer, mask).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, dA_RI, dB_OR, None, None
