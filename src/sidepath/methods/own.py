"""A module's own parameters, trained: private copies that answer in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sidepath.core.delta import Delta
from sidepath.core.views import View


class Own(Delta):
    """Copies of the parameters a module holds itself, whatever it computes with them.

    While the module runs they stand where the base's do; its children and buffers stay the base's.
    A parameter that another module of the adapter holds too (a tied head) is in one of them only,
    and lent to the others: see `lend`.
    """

    lent: dict[str, nn.Parameter]
    """Parameters of the module that another delta of the adapter owns."""

    def __init__(self, view: View) -> None:
        super().__init__()
        self.__dict__["lent"] = {}
        for name, parameter in view.module._parameters.items():
            if parameter is not None:
                self._parameters[name] = nn.Parameter(parameter.detach().clone())

    def lend(self, name: str, parameter: nn.Parameter) -> None:
        """Use another delta's parameter in the place of an own one. In place."""
        del self._parameters[name]
        self.lent[name] = parameter

    def forward(self, x: Tensor, base: View, *args: Any, **kwargs: Any) -> Tensor:
        with self._in_place_of(base.module):
            return base(x, *args, **kwargs)

    def onto(self, y: Tensor, x: Tensor, base: View) -> Tensor:
        return self.forward(x, base)

    @contextmanager
    def _in_place_of(self, module: nn.Module) -> Iterator[None]:
        held = dict(module._parameters)
        module._parameters.update(self._parameters)
        module._parameters.update(self.lent)
        try:
            yield
        finally:
            module._parameters.update(held)

    def folded(self, base: View, into: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        trained = {**self._parameters, **self.lent}
        return {name: tensor.detach() for name, tensor in trained.items() if tensor is not None}


def tie(deltas: Mapping[str, Delta], views: Mapping[str, View]) -> None:
    """Let parameters that are one in the base be one in the adapter. In place on the deltas."""
    first: dict[nn.Parameter, nn.Parameter] = {}
    for path, delta in deltas.items():
        if not isinstance(delta, Own):
            continue
        for name, own in list(delta._parameters.items()):
            held = views[path].module._parameters[name]
            assert held is not None
            assert own is not None
            if first.setdefault(held, own) is not own:
                delta.lend(name, first[held])
