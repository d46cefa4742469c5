"""Layers that see one input and are called one after another: computed together, once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sidepath.core.adapted import SIBLINGS
from sidepath.core.fused import Linears
from sidepath.core.routing import Routing
from sidepath.kernels.linear import SidePathLinears


class Projections(Linears):
    """Queries, keys and values: three layers that are called one after another on one input.

    The first one called computes all three, the others take what is there for them. Only while
    their module runs: nothing stays behind it, and who asks one of them alone is told of it alone.
    """

    names = ("q_proj", "k_proj", "v_proj")

    def __init__(self, module: nn.Module, routing: Routing) -> None:
        super().__init__(module, routing)
        self._running = False
        self._seen: Tensor | None = None
        self._ready: dict[nn.Module, Tensor] = {}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.base_class.forward(self.module, *args, **kwargs)
        self._running = True
        try:
            return self.base_class.forward(self.module, *args, **kwargs)
        finally:
            self._running, self._seen, self._ready = False, None, {}

    def answer(self, asked: nn.Module, x: Tensor) -> Tensor | None:
        """What `asked` makes of `x`, or None where it is to be computed by itself."""
        if self._seen is x and asked in self._ready:
            y = self._ready.pop(asked)
            if not self._ready:
                self._seen = None
            return y
        self._seen, self._ready = None, {}
        if not self._running or asked is not self.module._modules[self.names[0]]:
            return None
        layers = self.layers()
        if layers is None or any(layer.A_RI is None for layer in layers):
            return None
        factors = [tensor for layer in layers for tensor in (layer.A_RI, layer.B_OR)]
        ys = SidePathLinears.apply(x, layers, None, *factors)  # type: ignore[no-untyped-call]
        members = [self.module._modules[name] for name in self.names[1:]]
        self._seen = x
        self._ready = {m: y for m, y in zip(members, ys[1:], strict=True) if m is not None}
        return ys[0]  # type: ignore[no-any-return]

    def take(self) -> None:
        super().take()
        for name in self.names:
            self.module.get_submodule(name).__dict__[SIBLINGS] = self

    def give_back(self) -> None:
        super().give_back()
        for name in self.names:
            del self.module.get_submodule(name).__dict__[SIBLINGS]
