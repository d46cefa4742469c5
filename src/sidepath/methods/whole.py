"""A module trained whole: a private copy that answers in its place (heads, norms)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sidepath.core.delta import Delta
from sidepath.core.pristine import pristine_copy
from sidepath.core.views import View


class Whole(Delta):
    """The adapter's own copy of a module. The base's module is neither called nor changed."""

    def __init__(self, view: View) -> None:
        super().__init__()
        self.copy = pristine_copy(view.module).requires_grad_(True)

    def forward(self, x: Tensor, base: View, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.copy(x, *args, **kwargs)
        return result

    def onto(self, y: Tensor, x: Tensor, base: View) -> Tensor:
        result: Tensor = self.copy(x)
        return result

    def folded(self, base: View, into: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.copy.state_dict().items()}

    def touches(self, base: View) -> set[str]:
        return set(self.copy.state_dict())

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of the copy, by their name within the module."""
        return dict(self.copy.state_dict(keep_vars=True))
