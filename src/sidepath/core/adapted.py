"""A module with side paths: its class is swapped, in place, for one that consults them.

The module object, its parameters, their names and its hooks stay what they were; the deltas
live in one child module called `sidepath`. `restore` is the exact inverse.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from sidepath.core.delta import Delta
from sidepath.core.routed import routed
from sidepath.core.routing import Routing
from sidepath.core.views import View

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


class Adapted(nn.Module):
    """Mixed in before a module's own class: base output plus what the routing asks for."""

    sidepath: SidePaths

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        side = self.sidepath
        routing = side.routing
        if not routing.silent:
            if routing.rows is not None:
                return routed(side, routing.rows, x, *args, **kwargs)
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
    side = SidePaths(view, routing, path).train(module.training)
    module.__dict__.pop("forward", None)
    module.__class__ = _adapted_class(view.base_class)
    module.add_module(CHILD, side)
    return side


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
    view = side.view
    del view.module._modules[CHILD]
    view.module.__class__ = view.base_class
    if view.own_forward is not None:
        view.module.__dict__["forward"] = view.own_forward
