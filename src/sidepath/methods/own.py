"""A module's own parameters, trained: private copies that answer in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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


class Own(Delta):
    """Copies of the parameters a module holds itself, whatever it computes with them, and of those
    children that it reads and does not call.

    While the module runs they stand where the base's do; all else stays the base's.
    A parameter that another module of the adapter holds too (a tied head) is in one of them only,
    and lent to the others: see `lend`.
    """

    lent: dict[str, nn.Parameter]
    """Parameters of the module that another delta of the adapter owns."""

    def __init__(self, view: View) -> None:
        super().__init__()
        self.__dict__["lent"] = {}
        for name, (_, _, parameter) in _held(view.module).items():
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
        held = _held(module)
        trained = {**self._parameters, **self.lent}
        for name, (owner, local, _) in held.items():
            owner._parameters[local] = trained[name]
        try:
            yield
        finally:
            for owner, local, parameter in held.values():
                owner._parameters[local] = parameter

    def folded(self, base: View, into: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        trained = {**self._parameters, **self.lent}
        return {name: tensor.detach() for name, tensor in trained.items() if tensor is not None}


def _held(module: nn.Module) -> dict[str, tuple[nn.Module, str, nn.Parameter]]:
    """The parameters that a module uses itself: their owner and their name there, by their name
    seen from the module.
    """
    owners = {"": module} | {
        f"{name}.": child
        for name, child in module._modules.items()
        if child is not None and read_by_parent(name, child)
    }
    return {
        prefix + local: (owner, local, parameter)
        for prefix, owner in owners.items()
        for local, parameter in owner._parameters.items()
        if parameter is not None
    }


def tie(deltas: Mapping[str, Delta], views: Mapping[str, View]) -> None:
    """Let parameters that are one in the base be one in the adapter. In place on the deltas."""
    first: dict[nn.Parameter, nn.Parameter] = {}
    for path, delta in deltas.items():
        if not isinstance(delta, Own):
            continue
        for name, own in list(delta._parameters.items()):
            _, _, held = _held(views[path].module)[name]
            assert own is not None
            if first.setdefault(held, own) is not own:
                delta.lend(name, first[held])
