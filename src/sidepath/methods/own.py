"""A module's own parameters, trained: others that answer in their place."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sidepath.core.delta import Delta
from sidepath.core.views import View


class InPlaceOf(Delta):
    """Tensors that stand where a module's own parameters do while it runs.

    Whatever the module computes with them is left to it; its children and buffers stay the base's.
    A parameter that another delta of the adapter owns is `lent` to this one: it is trained and
    saved once, there.
    """

    lent: dict[str, nn.Parameter]
    """Parameters that another delta of the adapter owns, by their name here."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["lent"] = {}

    def lend(self, name: str, parameter: nn.Parameter) -> None:
        """Use another delta's parameter in the place of an own one of that name. In place."""
        self._parameters.pop(name, None)
        self.lent[name] = parameter

    def trained(self) -> dict[str, nn.Parameter]:
        """Own and lent parameters by name."""
        own = {name: held for name, held in self._parameters.items() if held is not None}
        return own | self.lent

    @abstractmethod
    def stand_ins(self, base: View) -> Mapping[str, Tensor]:
        """What takes the place of the module's parameters, by their name within it."""

    def forward(self, x: Tensor, base: View, *args: Any, **kwargs: Any) -> Tensor:
        with _in_place_of(base.module, self.stand_ins(base)):
            return base(x, *args, **kwargs)

    def onto(self, y: Tensor, x: Tensor, base: View) -> Tensor:
        return self.forward(x, base)

    def folded(self, base: View, into: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.stand_ins(base).items()}


class Own(InPlaceOf):
    """Trained copies of the parameters a module holds itself.

    One that another module of the adapter holds too (a tied head) is in one of them only, and lent
    to the others: see `tie`.
    """

    def __init__(self, view: View) -> None:
        super().__init__()
        for name, parameter in view.module._parameters.items():
            if parameter is not None:
                self._parameters[name] = nn.Parameter(parameter.detach().clone())

    def stand_ins(self, base: View) -> Mapping[str, Tensor]:
        return self.trained()


@contextmanager
def _in_place_of(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    held = dict(module._parameters)
    module._parameters.update(tensors)  # type: ignore[arg-type]
    try:
        yield
    finally:
        module._parameters.update(held)


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
