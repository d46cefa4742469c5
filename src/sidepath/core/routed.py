"""A routed batch in one layer: the base's product once, then each adapter's delta on its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sidepath.core.delta import Delta
from sidepath.core.routing import RowIndex, Rows
from sidepath.errors import RoutingError

if TYPE_CHECKING:
    from sidepath.core.adapted import SidePaths


def routed(side: SidePaths, rows: Rows, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """One base product for all rows, then each group's delta onto its rows."""
    if x.shape[0] != rows.count:
        raise RoutingError(
            "the batch has another number of rows than the routing",
            where=side.path,
            found=f"input of shape {tuple(x.shape)}",
            expected=f"{rows.count} rows, one adapter each",
            hint="give route() one name (or None) for each row of the batch",
        )
    y = side.view(x, *args, **kwargs)
    if torch.is_grad_enabled():
        return _trained(side, rows, y, x)
    for name, index in rows.groups:
        delta = side.get(name)
        if delta is not None:
            y[index] = delta.onto(y[index], x[index], side.view)
    return y


def _trained(side: SidePaths, rows: Rows, y: Tensor, x: Tensor) -> Tensor:
    """The same with gradients: the deltas of one class at once, nothing written into `y`."""
    placed: dict[type[Delta], list[tuple[Delta, RowIndex]]] = {}
    for name, index in rows.groups:
        delta = side.get(name)
        if delta is not None:
            placed.setdefault(type(delta), []).append((delta, index))
    for cls, pairs in placed.items():
        y = cls.onto_rows(y, x, side.view, pairs, rows)
    return y
