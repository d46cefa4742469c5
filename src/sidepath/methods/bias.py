"""The bias alone, trained: beside layers whose matrix is left as it is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sidepath.core.delta import Delta, add_bias, fold_bias
from sidepath.core.views import View


class BiasOnly(Delta):
    """`y + (b' - b)`: the module's bias `b (O)` replaced by a trained copy `b'`.

    Right for every module that adds its bias last: linear layers, convolutions, norms.
    """

    def __init__(self, view: View) -> None:
        super().__init__()
        self.bias = trained_bias(view)

    def onto(self, y: Tensor, x: Tensor, base: View) -> Tensor:
        return add_bias(y, self.bias, base)

    def folded(self, base: View, into: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        return {"bias": fold_bias(self.bias, base)}

    def touches(self, base: View) -> set[str]:
        return {"bias"}


def trained_bias(view: View, values_O: torch.Tensor | None = None) -> nn.Parameter:
    """A trainable copy of a module's bias, or `values`, in its dtype and on its device."""
    own = view.module.bias
    assert isinstance(own, torch.Tensor)
    return nn.Parameter(own.detach().clone() if values_O is None else values_O.to(own))
