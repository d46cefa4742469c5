"""A module with side paths: its class is swapped, in place, for one that consults them.

The module object, its parameters, their names and its hooks stay what they were; the deltas
live in one child module called `sidepath`. `restore` is the exact inverse.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, is_autocast_enabled, is_grad_enabled, nn
from torch.compiler import is_compiling

from sidepath.core.around import CallView, call_class
from sidepath.core.delta import Delta
from sidepath.core.routed import routed
from sidepath.core.routing import Routing, key_of, name_of
from sidepath.core.views import View

CHILD = "sidepath"
SIBLINGS = "_sidepath_siblings"
"""Where a layer finds those that see its input too (`core/siblings.py`)."""


class SidePaths(nn.Module):
    """The named deltas beside one module, and the routing they obey."""

    view: View
    routing: Routing
    path: str

    def __init__(self, view: View, routing: Routing, path: str) -> None:
        super().__init__()
        # Not through torch's `__setattr__`: there is one of these a layer.
        self.__dict__.update(view=view, routing=routing, path=path)

    def add(self, name: str, delta: Delta) -> None:
        self._modules[key_of(name)] = delta

    def drop(self, name: str) -> None:
        del self._modules[key_of(name)]

    def get(self, name: str) -> Delta | None:
        delta = self._modules.get(key_of(name))
        assert delta is None or isinstance(delta, Delta)
        return delta

    def names(self) -> list[str]:
        """The adapters that have a delta here, in the order they came."""
        return [name_of(key) for key in self._modules]


class Adapted(nn.Module):
    """Mixed in before a module's own class: base output plus what the routing asks for."""

    sidepath: SidePaths

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        side: Any = self._modules[CHILD]  # torch's own lookup would be a Python call
        routing = side.routing
        if not routing.silent:
            if routing.rows is not None:
                return routed(side, routing.rows, x, *args, **kwargs)
            delta: Any = side._modules.get(routing.key)
            if delta is not None:
                y: Tensor | None = None
                if not routing.fused or is_compiling() or is_autocast_enabled(x.device.type):
                    y = delta.forward(x, side.view, *args, **kwargs)
                elif (siblings := self.__dict__.get(SIBLINGS)) is not None and is_grad_enabled():
                    y = siblings.answer(self, x)
                return delta.fused(x, side.view, *args, **kwargs) if y is None else y
        base: View = side.view
        return base(x, *args, **kwargs)


_adapted_classes: dict[tuple[type[nn.Module], bool], type[nn.Module]] = {}


def _adapted_class(view: View) -> type[nn.Module]:
    cls = view.base_class
    key = (cls, isinstance(view, CallView))
    if key not in _adapted_classes:
        if isinstance(view, CallView):
            _adapted_classes[key] = call_class(cls)
        else:
            name = f"Adapted{cls.__name__}"
            _adapted_classes[key] = type(name, (Adapted, cls), {"__module__": cls.__module__})
    return _adapted_classes[key]


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
    object.__setattr__(module, "__class__", _adapted_class(side.view))


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


def restore(side: SidePaths) -> None:
    """Give an adapted module back its own class and forward. In place."""
    del side.view.module._modules[CHILD]
    _own_again(side.view)
