"""A module with side paths: its class is swapped, in place, for one that consults them.

The module object, its parameters, their names and its hooks stay what they were; the deltas
live in one child module called `sidepath`. `restore` is the exact inverse.
"""

from __future__ import annotations

import copy
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

    view: View
    routing: Routing
    path: str

    def __init__(self, view: View, routing: Routing, path: str) -> None:
        super().__init__()
        # Not through torch's `__setattr__`: there is one of these a layer.
        self.__dict__ |= {"view": view, "routing": routing, "path": path}

    def add(self, name: str, delta: Delta) -> None:
        self._modules[key_of(name)] = delta

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
                    result: Tensor = delta(x, side.view, *args, **kwargs)
                    return result
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
    side = SidePaths(view, routing, path)
    side.__dict__["training"] = module.training
    module._modules[CHILD] = side
    speak_up(side)
    return side


def speak_up(side: SidePaths) -> None:
    """Let a module ask its side paths in each forward pass. In place; undone by `step_aside`."""
    module = side.view.module
    module.__dict__.pop("forward", None)
    module.__class__ = _adapted_class(side.view.base_class)


def step_aside(side: SidePaths) -> None:
    """Give a module its own class and forward while its side paths stay silent. In place.

    It then runs the base's code, call for call. A packed layer does not: its own forward could
    not read the plain weight that a merge leaves in it, and its view can.
    """
    if type(side.view).__call__ is View.__call__:
        _own_again(side.view)


def _own_again(view: View) -> None:
    view.module.__class__ = view.base_class
    if view.own_forward is not None:
        view.module.__dict__["forward"] = view.own_forward


def pristine_copy(module: nn.Module) -> nn.Module:
    """A deep copy of a module, and of all below it, as it was before any side path came."""
    # Copied one by one, so that a twin of fake tensors (a plan) can be copied too.
    memo: dict[int, object] = {
        id(own): nn.Parameter(own.detach().clone(), own.requires_grad)
        for own in module.parameters()
        if own.is_floating_point()
    }
    memo |= {id(own): own.detach().clone() for own in module.buffers()}
    twin = copy.deepcopy(module, memo)
    for inner in list(twin.modules()):
        side = inner._modules.get(CHILD)
        if isinstance(side, SidePaths):
            restore(side)
    return twin


def restore(side: SidePaths) -> None:
    """Give an adapted module back its own class and forward. In place."""
    del side.view.module._modules[CHILD]
    _own_again(side.view)
