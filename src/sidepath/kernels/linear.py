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
import torch.nn.functional as F
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


FEW = 32
"""Rows up to which thin products run in float32 beside a 16-bit layer on a CPU: there a product
of two 16-bit matrices costs some 17 us a call, of float32 ones 7, and casting few rows little."""


def beside(x: Tensor, base: Frozen, A_RI: Tensor, B_OR: Tensor, scaling: float) -> Tensor:
    """`W0 x + b + s B (A x)` where no gradient is recorded: few operations, for few rows."""
    y = base(x).contiguous()
    x_NI, y_NO = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    if x.dtype.itemsize == 2 and x_NI.shape[0] <= FEW and not x.is_cuda:
        h_NR = F.linear(x_NI.float(), A_RI.float())
        y_NO.add_(F.linear(h_NR, B_OR.float()), alpha=scaling)
    else:
        h_NR = F.linear(x_NI, A_RI.to(x.dtype))
        y_NO.addmm_(h_NR, B_OR.to(x.dtype).T, alpha=scaling)
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
        parts = iter(torch.split(hidden_SN, [*map(len, As)]))
    ys: list[Tensor] = []
    hiddens: list[Tensor | None] = []
    for base, W_OI, bias_O, A_RI, B_OR, scaling in layers:
        if A_RI is None or B_OR is None:
            # Of three dimensions torch's linear gives a view, which nobody could write into.
            y, hidden_RN = base(x), None
            y = torch.ops.aten._unsafe_view(y, y.shape)
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
    over: bool = False,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """`dx` (N, I) of layers that saw one input, if it is wanted, and `dA, dB` of each.

    `over`: `dx` takes the place of `x`. Fresh memory costs a page fault every 4 KiB, which for a
    product this thin is more than the product.
    """
    dtype = x_NI.dtype
    there = [number for number, hidden_RN in enumerate(hiddens) if hidden_RN is not None]
    As = [A_RI.to(dtype) for layer in layers if (A_RI := layer.A_RI) is not None]
    ranks = [len(A_RI) for A_RI in As]
    g_SN = x_NI.new_empty(sum(ranks), len(x_NI))
    gradients: list[Tensor | None] = [None] * (2 * len(layers))
    for number, g_RN in zip(there, _rows(g_SN, ranks), strict=True):
        _, _, _, _, B_OR, scaling = layers[number]
        dy_NO, hidden_RN = dys[number], hiddens[number]
        assert B_OR is not None
        assert hidden_RN is not None
        torch.mm(B_OR.to(dtype).T.contiguous(), dy_NO.T, out=g_RN).mul_(scaling)
        if B_OR.requires_grad:
            gradients[2 * number + 1] = (hidden_RN @ dy_NO).T.to(B_OR.dtype)
    if any(_trains(layers[number].A_RI) for number in there):
        dA_SI = g_SN @ (x_NI if mask is None else mask.on(x_NI))
        for number, dA_RI in zip(there, _rows(dA_SI, ranks), strict=True):
            A_RI = layers[number].A_RI
            gradients[2 * number] = dA_RI if A_RI is None else dA_RI.to(A_RI.dtype)
    if not wanted:
        return None, gradients
    dx_NI = x_NI if over else torch.empty_like(x_NI)
    return _input_gradient(layers, dys, As, g_SN, mask, dx_NI), gradients


def _input_gradient(
    layers: Sequence[Layer],
    dys: Sequence[Tensor],
    As: Sequence[Tensor],
    g_SN: Tensor,
    mask: Mask | None,
    dx_NI: Tensor,
) -> Tensor:
    """`dx = dy W0 + g A` over all layers, written into `dx_NI`."""
    if As:
        torch.mm(g_SN.T, As[0] if len(As) == 1 else torch.cat(list(As)), out=dx_NI)
    else:
        dx_NI.zero_()
    dx_NI = dx_NI if mask is None else mask.on(dx_NI)
    for layer, dy_NO in zip(layers, dys, strict=True):
        W_OI = layer.base.matrix_as(dx_NI.dtype) if layer.W_OI is None else layer.W_OI
        dx_NI.addmm_(dy_NO, W_OI)
    return dx_NI


def _rows(stacked_SN: Tensor, ranks: Sequence[int]) -> tuple[Tensor, ...]:
    return torch.split(stacked_SN, list(ranks))


def _trains(factor: Tensor | None) -> bool:
    return factor is not None and factor.requires_grad


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
        # What `save` does, without a call: this runs once a layer.
        tensors: list[Tensor | None] = []
        ctx.frozen = frozen = []
        for layer in layers:
            tensors += layer[1:5]
            frozen.append((layer.base, layer.scaling))
        ctx.save_for_backward(*tensors, *hiddens, *kept)
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
        Layer._make((base, *tensors[4 * number : 4 * number + 4], scaling))
        for number, (base, scaling) in enumerate(ctx.frozen)
    ]
    return layers, tensors[4 * count : 5 * count], tensors[5 * count :]
