"""A module's own parameters, trained: others that answer in their place."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from sidepath.core.delta import Delta
from sidepath.core.quant import qualified
from sidepath.core.views import NEVER_CALLED, View

READ_BY_PARENT = ("rel_embeddings",)
"""Children, by name, that are never called: their parent reads their weight (DeBERTa)."""


def read_by_parent(name: str, module: nn.Module) -> bool:
    """Whether a child of that name is never called, so that what is trained of it has to stand
    there while its parent runs.
    """
    return name in READ_BY_PARENT or qualified(type(module)) == NEVER_CALLED


class Held(NamedTuple):
    """A parameter that a module uses itself."""

    owner: nn.Module
    """The module, or a child that it reads and does not call."""
    local: str
    """Its name there."""
    parameter: nn.Parameter


def held_by(module: nn.Module) -> dict[str, Held]:
    """The parameters that a module uses itself, by their name seen from it."""
    owners = {"": module} | {
        f"{name}.": child
        for name, child in module._modules.items()
        if child is not None and read_by_parent(name, child)
    }
    return {
        prefix + local: Held(owner, local, parameter)
        for prefix, owner in owners.items()
        for local, parameter in owner._parameters.items()
        if parameter is not None
    }


class InPlaceOf(Delta):
    """Tensors that stand where the parameters a module uses itself do while it runs.

    Whatever the module computes with them is left to it; all else stays the base's.
    A parameter that another delta of the adapter owns is `lent` to this one: it is trained and
    saved once, there.
    """

    shares = True
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
        """What takes the place of the module's parameters, by their names as `held_by` has them."""

    def forward(self, x: Tensor, base: View, *args: Any, **kwargs: Any) -> Tensor:
        with _in_place_of(base.module, self.stand_ins(base)):
            return base(x, *args, **kwargs)

    def onto(self, y: Tensor, x: Tensor, base: View) -> Tensor:
        return self.forward(x, base)

    def folded(self, base: View, into: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.stand_ins(base).items()}

    def touches(self, base: View) -> set[str]:
        return set(held_by(base.module))


class Own(InPlaceOf):
    """Trained copies of the parameters a module uses itself.

    One that another module of the adapter holds too (a tied head) is in one of them only, and lent
    to the others: see `tie`.
    """

    def __init__(self, view: View) -> None:
        super().__init__()
        for name, held in held_by(view.module).items():
            self._parameters[name] = nn.Parameter(held.parameter.detach().clone())

    def stand_ins(self, base: View) -> Mapping[str, Tensor]:
        return self.trained()


@contextmanager
def _in_place_of(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    held = held_by(module)
    for name, (owner, local, _) in held.items():
        owner._parameters[local] = tensors[name]  # type: ignore[assignment]
    try:
        yield
    finally:
        for owner, local, parameter in held.values():
            owner._parameters[local] = parameter


def tie(deltas: Mapping[str, Delta], views: Mapping[str, View]) -> None:
    """Let parameters that are one in the base be one in the adapter. In place on the deltas."""
    first: dict[nn.Parameter, nn.Parameter] = {}
    for path, delta in deltas.items():
        if not isinstance(delta, Own):
            continue
        held = held_by(views[path].module)
        for name, own in list(delta._parameters.items()):
            base = held[name].parameter
            assert own is not None
            if first.setdefault(base, own) is not own:
                delta.lend(name, first[base])
