"""A delta that stands around a module's whole call, keyword arguments and all.

Most deltas change what a module makes of one tensor. Some have to change what a model's body is
called with, such as positions put before its input: they get the call as it came.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sidepath.core.delta import LayerDelta
from sidepath.core.routing import Rows
from sidepath.core.views import View
from sidepath.errors import RoutingError

if TYPE_CHECKING:
    from sidepath.core.adapted import SidePaths


class CallView(View):
    """A module whose side paths stand around its whole call."""


class CallDelta(LayerDelta, ABC):
    """One adapter's change to how one module is called; a fresh one may change the outputs."""

    @abstractmethod
    def call(self, base: View, *args: Any, **kwargs: Any) -> Any:
        """What the module's call gives with this adapter; arguments and result are the module's."""

    def onto(self, y: Tensor, x: Tensor, base: View) -> Tensor:
        """Errors: `RoutingError`, always: the change is no update of the module's output."""
        raise RoutingError(_APART, found=type(self).__name__, hint=_ALONE)


_APART = "an adapter that changes how the model's body is called cannot be put onto its output"
_ALONE = "sidepath.activate(model, name), and give it a batch of its own"


def call_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A class like `cls` whose call consults its side paths.

    Its name is that of `cls`, by which transformers finds what a body can record, and so is its
    signature, from which callers read what it takes.
    """
    own: Callable[..., Any] = cls.forward

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        side: SidePaths = self.sidepath
        routing = side.routing
        if not routing.silent:
            if routing.rows is not None:
                _refuse_rows(side, routing.rows)
            elif (delta := side._modules.get(routing.key)) is not None:
                if not isinstance(delta, CallDelta):
                    raise RoutingError(_APART, where=side.path, hint=_ALONE)
                return delta.call(side.view, *args, **kwargs)
        return side.view(*args, **kwargs)

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "forward": forward}
    return type(cls.__name__, (cls,), names)


def _refuse_rows(side: SidePaths, rows: Rows) -> None:
    named = [name for name, _ in rows.groups if side.get(name) is not None]
    if named:
        raise RoutingError(
            "rows cannot be routed to adapters that put positions before a row: the rows of one "
            "batch would no longer stand at the same places of its masks and caches",
            where=side.path,
            found=", ".join(f'"{name}"' for name in named),
            hint=_ALONE,
        )
