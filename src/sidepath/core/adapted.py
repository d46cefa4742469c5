"""A module with side paths: its class is swapped, in place, for one that consults them.

The module object, its parameters, their names and its hooks stay what they were; the deltas
live in one child module called `sidepath`. `restore` is the exact inverse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sidepath.core.delta import Delta
from sidepath.core.routing import Routing, RowIndex, Rows
from sidepath.core.views import View
from sidepath.errors import RoutingError

CHILD = "sidepath"


def key_of(name: str) -> str:
    """An adapter's name as a module key: torch refuses dots and names of its own methods."""
    return "@" + name.replace(".", "/")


class SidePaths(nn.Module):
    """The named deltas beside one module, and the routing they obey."""

    def __init__(self, view: View, routing: Routing, path: str) -> None:
        super().__init__()
        self.view = view
        self.routing = routing
        self.path = path

    def add(self, name: str, delta: Delta) -> None:
        self.add_module(key_of(name), delta)

    def drop(self, name: str) -> None:
        del self._modules[key_of(name)]

    def get(self, name: str) -> Delta | None:
        delta = self._modules.get(key_of(name))
        assert delta is None or isinstance(delta, Delta)
        return delta

    def routed(self, rows: Rows, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """One base product for all rows, then each group's delta onto its rows."""
        if x.shape[0] != rows.count:
            raise RoutingError(
                "the batch has another number of rows than the routing",
                where=self.path,
                found=f"input of shape {tuple(x.shape)}",
                expected=f"{rows.count} rows, one adapter each",
                hint="give route() one name (or None) for each row of the batch",
            )
        y = self.view(x, *args, **kwargs)
        if torch.is_grad_enabled():
            return self._trained(rows, y, x)
        for name, index in rows.groups:
            delta = self.get(name)
            if delta is not None:
                y[index] = delta.onto(y[index], x[index], self.view)
        return y

    def _trained(self, rows: Rows, y: Tensor, x: Tensor) -> Tensor:
        """The same with gradients: the deltas of one class at once, nothing written into `y`."""
        placed: dict[type[Delta], list[tuple[Delta, RowIndex]]] = {}
        for name, index in rows.groups:
            delta = self.get(name)
            if delta is not None:
                placed.setdefault(type(delta), []).append((delta, index))
        for cls, pairs in placed.items():
            y = cls.onto_rows(y, x, self.view, pairs, rows)
        return y


class Adapted(nn.Module):
    """Mixed in before a module's own class: base output plus what the routing asks for."""

    sidepath: SidePaths

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        side = self.sidepath
        routing = side.routing
        if not routing.silent:
            if routing.rows is not None:
                return side.routed(routing.rows, x, *args, **kwargs)
            if routing.active is not None:
                delta = side.get(routing.active)
                if delta is not None:
                    answer = delta.fused if routing.fused else delta.forward
                    return answer(x, side.view, *args, **kwargs)
        return side.view(x, *args, **kwargs)


_adapted_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _adapted_class(cls: type[nn.Module]) -> type[nn.Module]:
    if cls not in _adapted_classes:
        name = f"Adapted{cls.__name__}"
        _adapted_classes[cls] = type(name, (Adapted, cls), {"__module__": cls.__module__})
    return _adapted_classes[cls]


def adapt(view: View, routing: Routing, path: str) -> SidePaths:
    """Make a view's module consult side paths; returns where they are kept. In place."""
    module = view.module
    side = SidePaths(view, routing, path).train(module.training)
    module.__dict__.pop("forward", None)
    module.__class__ = _adapted_class(view.base_class)
    module.add_module(CHILD, side)
    return side


def restore(side: SidePaths) -> None:
    """Give an adapted module back its own class and forward. In place."""
    view = side.view
    del view.module._modules[CHILD]
    view.module.__class__ = view.base_class
    if view.own_forward is not None:
        view.module.__dict__["forward"] = view.own_forward
