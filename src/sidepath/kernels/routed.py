"""The routed product: every row of a batch gets the low-rank update of its own adapter.

    y[t] += s_k B_k (A_k x[t]),  k = slot of row t;  rows of no slot are not touched

The factors of all adapters of one layer stand below one another in a `Stack`, each with its own
rank. How they are multiplied is decided once for a batch's rows (`rowplan.py`): all of them at
once and masked, one slice after another, or in batched tiles (as Punica's SGMV does for a GPU;
Chen et al., 2023, section 4). Every form does the same three things, forwards and backwards.

Dimensions: B rows, T tokens a row, N = B T tokens, I in, O out, S sum of the ranks, K slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sidepath.kernels.rowforms import RowPlan as RowPlan
from sidepath.kernels.rowplan import plan_rows as plan_rows

FEW = 64
"""Tokens up to which a copy of them in float32 costs no more than it saves (docs/log.md)."""

Factors = tuple[Tensor, Tensor, float]
"""One adapter's `A (r, I)`, `B (O, r)` and scaling."""


@dataclass(frozen=True)
class Stack:
    """The factors of the adapters of one layer, below one another: slot k has rows
    [starts[k], starts[k + 1]) of both; a slot of no rows is a layer's that the adapter left alone.

    `A_SI` are the `A`s; `B_SO` the transposed `B`s with each adapter's scaling already in them.
    Both are contiguous and of the dtype the product runs in.
    """

    A_SI: Tensor
    B_SO: Tensor
    starts: tuple[int, ...]


def stacked(factors: Sequence[Factors | None], dtype: torch.dtype) -> Stack | None:
    """The stack of some adapters' factors, by slot; None when no slot has any.

    Differentiable in the factors. The scaling is multiplied in before rounding to `dtype`.
    """
    starts = [0]
    for each in factors:
        starts.append(starts[-1] + (0 if each is None else len(each[0])))
    there = [each for each in factors if each is not None]
    if not there:
        return None
    A_SI = torch.cat([A_RI for A_RI, _, _ in there])
    # Widened before it is scaled, so that it is rounded once whatever it is kept in.
    B_SO = torch.cat(
        [(B_OR.to(torch.promote_types(B_OR.dtype, dtype)) * s).T for _, B_OR, s in there]
    )
    return Stack(A_SI.to(dtype), B_SO.to(dtype), tuple(starts))


def add_stack_(y_BTO: Tensor, x_BTI: Tensor, stack: Stack, plan: RowPlan | None) -> None:
    """Add each row's own update to `y`. In place; `y` and `x` of the stack's dtype.

    `plan` is `plan_rows` of the batch's slots and the stack's `starts`; None: nothing to add.
    """
    if plan is not None:
        add_arranged_(y_BTO, x_BTI, plan, plan.arrange(stack.A_SI), plan.arrange(stack.B_SO))


def add_arranged_(y_BTO: Tensor, x_BTI: Tensor, plan: RowPlan, A: Tensor, B: Tensor) -> None:
    """`add_stack_` with both factors arranged already: for a batch that comes again and again.

    Factors wider than `y` (see `product_dtype`) are multiplied and added as they are, and the sum
    is rounded once. Autocast is left out: every dtype here is chosen already.
    """
    if torch.is_autocast_enabled(y_BTO.device.type):
        with torch.autocast(y_BTO.device.type, enabled=False):
            add_arranged_(y_BTO, x_BTI, plan, A, B)
        return
    part = plan.take(y_BTO)
    wide = part.to(A.dtype)
    plan.expand_(wide, plan.shrink(plan.take(x_BTI).to(A.dtype), A), B)
    if wide is not part:
        part.copy_(wide)
    plan.put_(y_BTO, part)


def product_dtype(y: Tensor) -> torch.dtype:
    """The dtype in which thin products onto `y` are fastest: its own, or float32 where few tokens
    are of a narrower one on a CPU, whose 16-bit products cost 17 us a call and float32's 7.
    """
    narrow = y.dtype in (torch.bfloat16, torch.float16) and y.device.type == "cpu"
    few = y.numel() <= FEW * y.shape[-1]
    return torch.float32 if narrow and few else y.dtype


def add_routed_(
    y_NO: Tensor,
    x_NI: Tensor,
    A_SI: Tensor,
    B_SO: Tensor,
    starts: Sequence[int],
    scalings: Sequence[float],
    slot_N: Tensor,
) -> None:
    """`y[n] += scalings[k] B_k (A_k x[n])` with k = `slot_N[n]`; -1: that row is not touched.

    In place on `y`, which must be contiguous. Factors are stacked as in `Stack`, but unscaled; they
    are brought to `y`'s dtype, as is `x`. Reads `slot_N` on the host: where the same slots come
    more than once, keep their plan (`plan_rows`) and call `add_stack_`.
    """
    ranks = [stop - start for start, stop in pairwise(starts)]
    if any(scaling != 1.0 for scaling in scalings):
        each = [s for s, rank in zip(scalings, ranks, strict=True) for _ in range(rank)]
        B_SO = B_SO * torch.tensor(each, device=B_SO.device, dtype=B_SO.dtype)[:, None]
    stack = Stack(A_SI.to(y_NO.dtype), B_SO.to(y_NO.dtype), tuple(starts))
    plan = plan_rows(tuple(slot_N.tolist()), stack.starts, like=y_NO, width=_width(A_SI, B_SO))
    add_stack_(y_NO[:, None], x_NI[:, None].to(y_NO.dtype), stack, plan)


def _width(A_SI: Tensor, B_SO: Tensor) -> int:
    return A_SI.shape[1] + B_SO.shape[1]


class RoutedProduct(torch.autograd.Function):
    """`add_stack_` with gradients: dx = s (dy B) A, dA = s (dy B)ᵀ x, dB = s (A x)ᵀ dy, dy itself
    passed on. In place on `y`; keeps `x` and the factors, and computes `A x` anew in backward.
    """

    @staticmethod
    def forward(
        ctx: Any, y_BTO: Tensor, x_BTI: Tensor, A_SI: Tensor, B_SO: Tensor, plan: RowPlan
    ) -> Tensor:
        add_arranged_(y_BTO, x_BTI, plan, plan.arrange(A_SI), plan.arrange(B_SO))
        ctx.plan = plan
        ctx.save_for_backward(x_BTI, A_SI, B_SO)
        ctx.mark_dirty(y_BTO)
        return y_BTO

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy_BTO: Tensor) -> tuple[Tensor | None, ...]:
        plan: RowPlan = ctx.plan
        x_BTI, A_SI, B_SO = ctx.saved_tensors
        _, needs_x, needs_A, needs_B, _ = ctx.needs_input_grad
        dy_part = plan.take(dy_BTO.contiguous())
        x_part = plan.take(x_BTI)
        A, B = plan.arrange(A_SI), plan.arrange(B_SO)
        dx = dA = dB = None
        back = plan.shrink(dy_part, B) if needs_x or needs_A else None
        if needs_x:
            dx = torch.zeros_like(x_BTI, memory_format=torch.contiguous_format)
            part = plan.take(dx)
            plan.expand_(part, back, A)
            plan.put_(dx, part)
        if needs_A:
            dA = plan.outer(back, x_part, len(A_SI))
        if needs_B:
            dB = plan.outer(plan.shrink(x_part, A), dy_part, len(B_SO))
        return dy_BTO, dx, dA, dB, None


def add_stack(y_BTO: Tensor, x_BTI: Tensor, stack: Stack, plan: RowPlan | None) -> Tensor:
    """`add_stack_` for training: returns `y`, which is changed in place, with its gradients."""
    if plan is None:
        return y_BTO
    if torch.compiler.is_compiling():
        # A compiler sees through the plain operators and fuses their copies away; of a function
        # that changes its input it makes wrong shapes (torch 2.13, backend aot_eager).
        y_BTO = y_BTO.clone()
        add_stack_(y_BTO, x_BTI, stack, plan)
        return y_BTO
    result: Tensor = RoutedProduct.apply(y_BTO, x_BTI, stack.A_SI, stack.B_SO, plan)  # type: ignore[no-untyped-call]
    return result
