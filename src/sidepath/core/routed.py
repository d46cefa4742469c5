"""A routed batch in one layer: the base's product once, then each row's own update onto it.

Adapters that add `s B (A x)` and no more share their products (`kernels/routed.py`); any other
delta is put onto its own rows, one after another.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sidepath.core.routing import Layer, Placed, Rows, first_row
from sidepath.core.views import View
from sidepath.errors import RoutingError
from sidepath.kernels import on_gpu
from sidepath.kernels.routed import (
    RowPlan,
    Stack,
    add_arranged_,
    add_stack,
    plan_rows,
    product_dtype,
    stacked,
)

if TYPE_CHECKING:
    from sidepath.core.adapted import SidePaths
    from sidepath.core.delta import Delta


def routed(side: SidePaths, rows: Rows, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The layer's output, each row adapted by its own adapter; rows of the base to the bit.

    Without gradients the factors are stacked when the layer first answers in a `route` block and
    kept until it ends: what the adapters hold then is what answers within the block. With
    gradients they are stacked anew each time, and what was kept is dropped.
    """
    if x.shape[0] != rows.count:
        raise RoutingError(
            "the batch has another number of rows than the routing",
            where=side.path,
            found=f"input of shape {tuple(x.shape)}",
            expected=f"{rows.count} rows, one adapter each",
            hint="give route() one name (or None) for each row of the batch",
        )
    known = x if x.is_floating_point() else _known(side, rows, x)
    y: Any = side.view(known, *args, **kwargs)
    if isinstance(y, tuple):  # a whole block, which gives more than what the stream carries on
        return (_updated(side, rows, y[0], x), *y[1:])  # type: ignore[return-value]
    return _updated(side, rows, y, x)


def _known(side: SidePaths, rows: Rows, ids: Tensor) -> Tensor:
    """Token ids that the base can look up: in its own rows those that are there."""
    for name, index in rows.groups:
        delta = side.get(name)
        if delta is not None and delta.reach:
            ids = ids.clone()
            ids[index] = delta.known(ids[index])
    return ids


def _updated(side: SidePaths, rows: Rows, y: Tensor, x: Tensor) -> Tensor:
    """The base's output `y` for `x` with each row's update; in place where nothing looks back."""
    if torch.is_grad_enabled():
        return _trained(side, rows, y, x)
    dtype = product_dtype(y)
    key = (side.path, dtype)
    if key not in rows.layers:
        rows.layers[key] = Layer(_stack_of(side, rows, dtype), _others(side, rows))
    layer = rows.layers[key]
    if layer.stack is not None:
        y, y_BTO, x_BTI = _flat(y, x)
        plan, A, B = _arranged(layer, layer.stack, rows, y_BTO, x_BTI)
        if plan is not None:
            _add_(rows, layer.stack, y_BTO, x_BTI, plan, A, B)
    size = y.shape[-1]
    if layer.others:
        y = _wide_enough(y, x, layer.others)
    for delta, index in layer.others:
        y[index] = _onto(delta, y[index], x[index], side.view, size)
    return y


def _add_(
    rows: Rows, stack: Stack, y_BTO: Tensor, x_BTI: Tensor, plan: RowPlan, A: Tensor, B: Tensor
) -> None:
    if on_gpu.may_run(y_BTO):

        def plain(y_BTO: Tensor) -> None:
            add_arranged_(y_BTO, x_BTI, plan, A, B)

        on_gpu.add_stack_(y_BTO, x_BTI, stack, rows.slots, rows.tiles, plain)
    else:
        add_arranged_(y_BTO, x_BTI, plan, A, B)


def _arranged(
    layer: Layer, stack: Stack, rows: Rows, y_BTO: Tensor, x_BTI: Tensor
) -> tuple[RowPlan | None, Tensor, Tensor]:
    """How the layer's factors are multiplied for an input of this size, worked out once."""
    tokens = x_BTI.shape[1]
    if layer.arranged is None or layer.arranged[0] != tokens:
        plan = _plan(rows, stack, y_BTO, x_BTI)
        A, B = stack.A_SI, stack.B_SO
        if plan is not None:
            A, B = plan.arrange(A), plan.arrange(B)
        layer.arranged = (tokens, plan, A, B)
    return layer.arranged[1:]


def _trained(side: SidePaths, rows: Rows, y: Tensor, x: Tensor) -> Tensor:
    """The same with gradients."""
    for dtype in (y.dtype, torch.float32):
        rows.layers.pop((side.path, dtype), None)
    stack = _stack_of(side, rows, y.dtype)
    if stack is not None:
        y, y_BTO, x_BTI = _flat(y if _free(side.view) else y.clone(), x)
        plan = _plan(rows, stack, y_BTO, x_BTI)
        # Under autocast the input's dtype is not the output's.
        y = add_stack(y_BTO, x_BTI.to(y.dtype), stack, plan).view(y.shape)
    others = _others(side, rows)
    return _pieced(y, x, side.view, others) if others else y


def _wide_enough(y: Tensor, x: Tensor, placed: Placed) -> Tensor:
    """Logits with columns for tokens that only some adapters know, impossible in other rows."""
    reach = max(delta.reach for delta, _ in placed)
    missing = reach - y.shape[-1] if x.is_floating_point() else 0
    return y if not reach or missing <= 0 else pad(y, (0, missing), value=-math.inf)


def _stack_of(side: SidePaths, rows: Rows, dtype: torch.dtype) -> Stack | None:
    deltas = [side.get(name) for name, _ in rows.groups]
    return stacked([None if delta is None else delta.factors() for delta in deltas], dtype)


def _others(side: SidePaths, rows: Rows) -> Placed:
    """The deltas that share no product, with their rows."""
    placed = [(side.get(name), index) for name, index in rows.groups]
    return [(d, index) for d, index in placed if d is not None and d.factors() is None]


def _flat(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`y` contiguous, and both as (B, T, ·)."""
    y = y.contiguous()
    if x.dim() == 3:
        return y, y, x
    return y, y.view(y.shape[0], -1, y.shape[-1]), x.reshape(x.shape[0], -1, x.shape[-1])


def _plan(rows: Rows, stack: Stack, y_BTO: Tensor, x_BTI: Tensor) -> RowPlan | None:
    tokens, width = x_BTI.shape[1], x_BTI.shape[2] + y_BTO.shape[2]
    key = (stack.starts, tokens, width, stack.A_SI.dtype, y_BTO.device)
    if key not in rows.plans:
        rows.plans[key] = plan_rows(
            rows.slots, stack.starts, like=stack.A_SI, tokens=tokens, width=width
        )
    return rows.plans[key]


def _free(view: View) -> bool:
    """Whether the base's backward does not look at its own output, so that it may be changed."""
    return view.own_forward is None and view.base_class.forward is nn.Linear.forward


def _pieced(y: Tensor, x: Tensor, base: View, placed: Placed) -> Tensor:
    """Each delta put onto its own rows with gradients; `y` is not changed.

    What autograd keeps is one piece a delta, where each one's rows lie together.
    """
    size, whole = y.shape[-1], y
    y = _wide_enough(y, x, placed)
    pieces, done = [], 0
    for delta, index in sorted(placed, key=lambda pair: first_row(pair[1])):
        if not isinstance(index, slice) or index.start < done:
            return _one_by_one(whole, x, base, placed)
        pieces += [y[done : index.start], _onto(delta, y[index], x[index], base, size)]
        done = index.stop
    return torch.cat([piece for piece in (*pieces, y[done:]) if len(piece)])


def _one_by_one(y: Tensor, x: Tensor, base: View, placed: Placed) -> Tensor:
    size = y.shape[-1]
    y = _wide_enough(y, x, placed).clone()
    for delta, index in placed:
        y[index] = _onto(delta, y[index], x[index], base, size)
    return y


def _onto(delta: Delta, y: Tensor, x: Tensor, base: View, size: int) -> Tensor:
    """A delta put onto its rows of `y`, of whose columns the base has the first `size`."""
    if delta.reach or y.shape[-1] == size:
        return delta.onto(y, x, base)
    return torch.cat([delta.onto(y[..., :size], x, base), y[..., size:]], -1)
