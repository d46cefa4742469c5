"""Frozen linear layers and their side paths in one piece of autograd.

    y = W0 x + b + s B (A x)        g = s dy B        dx = dy W0 + g A
    dA = g^T x                      dB = dy^T (s A x)

No gradient of `W0` exists. For the backward pass `x` is kept once, whoever else keeps it, and
`s A x`, which is r numbers a row. All products run in `x`'s dtype, whatever the factors are kept
in, so that no float32 copy of an activation is made; each is accumulated in float32 and rounded
once. The plain form is `kernels.lowrank`.

What costs in a thin product is reading and writing memory, so the low-rank part is made first
and the base's product is added onto it: that product touches its output in any case. Thin
matrices stand as (R, N) and (R, O), which is how this processor's libraries are fast on them.
Layers that see one input share the product with their stacked `A`.

Dimensions: `...` any leading, N rows of all of them, I in, O out, R rank, S sum of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sidepath.kernels.dropout import Mask
from sidepath.kernels.kept import keep


class Frozen(Protocol):
    """A linear layer of the base."""

    def __call__(self, x: Tensor) -> Tensor:
        """`W0 x + b`, a new tensor."""
        ...

    def matrix_as(self, dtype: torch.dtype) -> Tensor:
        """`W0` (O, I) in a dtype."""
        ...


class Layer(NamedTuple):
    """A frozen linear layer and the side path beside it, if there is one."""

    base: Frozen
    W_OI: Tensor | None
    """None: not there as numbers (packed into 4 bits), so `base` is asked each time."""
    bias_O: Tensor | None
    A_RI: Tensor | None = None
    B_OR: Tensor | None = None
    scaling: float = 1.0


class Outputs(NamedTuple):
    """What layers that see one input made of it."""

    ys: list[Tensor]
    hiddens: list[Tensor | None]
    """`s A x` of each, (R, N): the way back needs it."""


def flat(x: Tensor) -> Tensor:
    """All leading dimensions as one."""
    return x.reshape(-1, x.shape[-1])


def beside(x: Tensor, layer: Layer) -> Tensor:
    """`W0 x + b + s B (A x)` where no gradient is recorded: few operations, for few rows."""
    base, _, _, A_RI, B_OR, scaling = layer
    y = base(x).contiguous()
    if A_RI is not None and B_OR is not None:
        hidden_NR = x.reshape(-1, x.shape[-1]) @ A_RI.to(x.dtype).T
        y.view(-1, y.shape[-1]).addmm_(hidden_NR, B_OR.to(x.dtype).T, alpha=scaling)
    return y


def forth(x: Tensor, layers: Sequence[Layer], mask: Mask | None = None) -> Outputs:
    """What layers that see one input make of it; with a mask, their side paths see less of it."""
    x_NI = x.reshape(-1, x.shape[-1])
    As = []
    for layer in layers:
        if layer.A_RI is not None:
            As.append(layer.A_RI.to(x.dtype))
    parts: Iterator[Tensor] = iter(())
    if As:
        seen_NI = x_NI if mask is None else mask.on(x_NI)
        hidden_SN = (As[0] if len(As) == 1 else torch.cat(As)) @ seen_NI.T
        parts = iter(hidden_SN.split([*map(len, As)]))
    ys: list[Tensor] = []
    hiddens: list[Tensor | None] = []
    for base, W_OI, bias_O, A_RI, B_OR, scaling in layers:
        if A_RI is None or B_OR is None:
            y, hidden_RN = base(x), None
        else:
            hidden_RN = next(parts).mul_(scaling)
            h_NR, B_RO = hidden_RN.T, B_OR.to(x.dtype).T
            # Not a view of another tensor, so that whoever gets it may write into it.
            y = x.new_empty(*x.shape[:-1], len(B_OR))
            y_NO = y.view(-1, len(B_OR))
            if bias_O is None or W_OI is None:
                torch.mm(h_NR, B_RO, out=y_NO)
            else:
                torch.addmm(bias_O, h_NR, B_RO, out=y_NO)
            _ = y_NO.add_(base(x_NI)) if W_OI is None else y_NO.addmm_(x_NI, W_OI.T)
        ys.append(y)
        hiddens.append(hidden_RN)
    return Outputs(ys, hiddens)


def back(
    layers: Sequence[Layer],
    dys: Sequence[Tensor],
    x_NI: Tensor,
    hiddens: Sequence[Tensor | None],
    *,
    wanted: bool,
    mask: Mask | None = None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """`dx` (N, I) of layers that saw one input, if it is wanted, and `dA, dB` of each."""
    dtype = x_NI.dtype
    sided = [number for number, layer in enumerate(layers) if layer.A_RI is not None]
    As = [layers[number].A_RI.to(dtype) for number in sided]
    ranks = [len(A_RI) for A_RI in As]
    g_SN = x_NI.new_empty(sum(ranks), len(x_NI))
    gradients: list[Tensor | None] = [None] * (2 * len(layers))
    for number, g_RN in zip(sided, g_SN.split(ranks), strict=True):
        B_OR = layers[number].B_OR
        torch.mm(B_OR.to(dtype).T.contiguous(), dys[number].T, out=g_RN).mul_(
            layers[number].scaling
        )
        if B_OR.requires_grad:
            gradients[2 * number + 1] = (hiddens[number] @ dys[number]).T.to(B_OR.dtype)
    if any(layers[number].A_RI.requires_grad for number in sided):
        dA_SI = g_SN @ (x_NI if mask is None else mask.on(x_NI))
        for number, dA_RI in zip(sided, dA_SI.split(ranks), strict=True):
            gradients[2 * number] = dA_RI.to(layers[number].A_RI.dtype)
    if not wanted:
        return None, gradients
    dx_NI = g_SN.T @ (As[0] if len(As) == 1 else torch.cat(As)) if As else torch.zeros_like(x_NI)
    dx_NI = dx_NI if mask is None else mask.on(dx_NI)
    for layer, dy_NO in zip(layers, dys, strict=True):
        W_OI = layer.base.matrix_as(dtype) if layer.W_OI is None else layer.W_OI
        dx_NI.addmm_(dy_NO, W_OI)
    return dx_NI, gradients


class SidePathLinears(torch.autograd.Function):
    """`W0 x + b + s B (A x)` of layers that see one input, differentiable once, in `x` and the
    factors: a tuple with one output a layer.

    Called as `SidePathLinears.apply(x, layers, mask, A, B, A, B, ...)`, with the layers' own
    factors. With a mask the side paths see `mask.on(x)`; it is drawn again on the way back.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layers: Sequence[Layer], mask: Mask | None, *factors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ys, hiddens = forth(x, layers, mask)
        kept, ctx.again = keep(x)
        save(ctx, layers, hiddens, kept)
        ctx.mask = mask
        return tuple(ys)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        layers, hiddens, kept = saved(ctx)
        x = ctx.again(kept)
        dx_NI, gradients = back(
            layers,
            [flat(dy) for dy in dys],
            flat(x),
            hiddens,
            wanted=ctx.needs_input_grad[0],
            mask=ctx.mask,
        )
        dx = None if dx_NI is None else dx_NI.view(x.shape)
        return dx, None, None, *gradients


def save(
    ctx: Any, layers: Sequence[Layer], hiddens: Sequence[Tensor | None], rest: Sequence[Tensor]
) -> None:
    """Keep layers, what each made of `s A x`, and other tensors, for `saved`."""
    tensors: list[Tensor | None] = []
    for layer in layers:
        tensors += layer[1:5]
    ctx.save_for_backward(*tensors, *hiddens, *rest)
    ctx.frozen = [(layer.base, layer.scaling) for layer in layers]


def saved(ctx: Any) -> tuple[list[Layer], Sequence[Tensor | None], Sequence[Tensor]]:
    """What `save` kept."""
    count, tensors = len(ctx.frozen), ctx.saved_tensors
    layers = [
        Layer(base, *tensors[4 * number : 4 * number + 4], scaling)
        for number, (base, scaling) in enumerate(ctx.frozen)
    ]
    return layers, tensors[4 * count : 5 * count], tensors[5 * count :]
