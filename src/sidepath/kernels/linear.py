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

from collections.abc import Sequence
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

    @property
    def bias(self) -> Tensor | None:
        """`b` (O)."""
        ...

    def forth_(self, y_NO: Tensor, x_NI: Tensor) -> Tensor:
        """`y + W0 x`, in the place of `y`; for `y = b` the very numbers that a call gives."""
        ...

    def back_(self, dx_NI: Tensor, dy_NO: Tensor) -> Tensor:
        """`dx + dy W0`, in the place of `dx`."""
        ...


class Layer(NamedTuple):
    """A frozen linear layer and the side path beside it, if there is one."""

    base: FrozenLinear
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
    """`W0 x + b + s B (A x)` where no gradient is recorded: few rows cost few operations."""
    base, A_RI, B_OR, scaling = layer
    y = base(x)
    if A_RI is None or B_OR is None:
        return y
    y, x_NI = y.contiguous(), x.reshape(-1, x.shape[-1])
    hidden_NR = x_NI @ A_RI.to(x.dtype).T
    y.view(-1, y.shape[-1]).addmm_(hidden_NR, B_OR.to(x.dtype).T, alpha=scaling)
    return y


def forth(x: Tensor, layers: Sequence[Layer], mask: Mask | None = None) -> Outputs:
    """What layers that see one input make of it."""
    x_NI = x.reshape(-1, x.shape[-1])
    hiddens = _shrink(x_NI if mask is None else mask.on(x_NI), layers)
    return Outputs([_output(x, *pair) for pair in zip(layers, hiddens, strict=True)], hiddens)


def _shrink(x_NI: Tensor, layers: Sequence[Layer]) -> list[Tensor | None]:
    """`s A x` of each layer, (R, N): one product for all."""
    As = [layer.A_RI.to(x_NI.dtype) for layer in layers if layer.A_RI is not None]
    if not As:
        return [None] * len(layers)
    hidden_SN = _stacked(As) @ x_NI.T
    parts = iter(hidden_SN.split([len(A_RI) for A_RI in As]))
    return [
        None if layer.A_RI is None else next(parts).mul_(layer.scaling) for layer in layers
    ]


def _output(x: Tensor, layer: Layer, hidden_RN: Tensor | None) -> Tensor:
    base, _, B_OR, _ = layer
    if B_OR is None or hidden_RN is None:
        return base(x)
    B_RO, bias_O = B_OR.to(x.dtype).T, base.bias
    if bias_O is None:
        y_NO = torch.mm(hidden_RN.T, B_RO)
    else:
        y_NO = torch.addmm(bias_O.to(x.dtype), hidden_RN.T, B_RO)
    return base.forth_(y_NO, flat(x)).view(*x.shape[:-1], -1)


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
        torch.mm(B_OR.to(dtype).T.contiguous(), dys[number].T, out=g_RN).mul_(layers[number].scaling)
        if B_OR.requires_grad:
            gradients[2 * number + 1] = (hiddens[number] @ dys[number]).T.to(B_OR.dtype)
    if any(layers[number].A_RI.requires_grad for number in sided):
        dA_SI = g_SN @ (x_NI if mask is None else mask.on(x_NI))
        for number, dA_RI in zip(sided, dA_SI.split(ranks), strict=True):
            gradients[2 * number] = dA_RI.to(layers[number].A_RI.dtype)
    if not wanted:
        return None, gradients
    if not sided:
        dx_NI = torch.zeros_like(x_NI)
    else:
        dx_NI = g_SN.T @ _stacked(As)
    dx_NI = dx_NI if mask is None else mask.on(dx_NI)
    for layer, dy_NO in zip(layers, dys, strict=True):
        dx_NI = layer.base.back_(dx_NI, dy_NO)
    return dx_NI, gradients


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


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
        ctx.save_for_backward(*factors, *hiddens, *kept)
        ctx.frozen, ctx.mask = [(layer.base, layer.scaling) for layer in layers], mask
        return tuple(ys)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        layers, hiddens, kept = saved_layers(ctx)
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


def saved_layers(ctx: Any) -> tuple[list[Layer], Sequence[Tensor | None], Sequence[Tensor]]:
    """The layers of a context, what each had made of `A x`, and the other tensors it saved.

    Saved: `A` and `B` of each layer in `ctx.frozen`, then their `s A x`, then the rest.
    """
    count, saved = len(ctx.frozen), ctx.saved_tensors
    layers = [
        Layer(base, saved[2 * number], saved[2 * number + 1], scaling)
        for number, (base, scaling) in enumerate(ctx.frozen)
    ]
    return layers, saved[2 * count : 3 * count], saved[3 * count :]
