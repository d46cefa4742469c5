"""How a module of the base is computed in one piece while it is trained.

As with side paths the module stays and its class is swapped in place. The fused forward acts
only where gradients are recorded and one adapter answers; everywhere else, and for whatever it
does not know, the module's own forward pass runs. Which modules: `core/blocks.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from sidepath.core.adapted import CHILD, SidePaths
from sidepath.core.delta import Delta
from sidepath.core.routing import Routing
from sidepath.core.views import LinearView, View, view_of
from sidepath.kernels.linear import Layer

BLOCK = "_sidepath_block"


class Block:
    """How one module of a known class is computed in one piece."""

    def __init__(self, module: nn.Module, routing: Routing) -> None:
        self.module = module
        self.base_class = type(module)
        self.routing = routing

    def wanted(self, x: Tensor) -> bool:
        """Whether the fused pass may act on this input now."""
        routing = self.routing
        return (
            routing.fused
            and (routing.active is not None or routing.rows is not None)
            and not routing.silent
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled(x.device.type)
        )

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's forward gives: in one piece where that is possible."""
        if len(args) == 1 and not kwargs and self.wanted(args[0]):
            y = self.fused(args[0])
            if y is not None:
                return y
        return self.base_class.forward(self.module, *args, **kwargs)

    def fused(self, x: Tensor) -> Tensor | None:
        """The module's output, or None where its own forward pass has to run."""
        raise NotImplementedError

    def take(self) -> None:
        """Let the module be computed so. In place."""
        module, cls = self.module, self.base_class
        if cls not in _classes:
            made = type(cls.__name__, (FusedBlock, cls), {"__module__": cls.__module__})
            _classes[cls] = made
        module.__dict__[BLOCK] = self
        module.__class__ = _classes[cls]

    def give_back(self) -> None:
        """The inverse of `take`. In place."""
        del self.module.__dict__[BLOCK]
        self.module.__class__ = self.base_class


class FusedBlock(nn.Module):
    """Mixed in before a module's own class: one piece where that is possible."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        block: Block = self.__dict__[BLOCK]
        return block.run(*args, **kwargs)


_classes: dict[type[nn.Module], type[nn.Module]] = {}


class Linears(Block):
    """A block with linear layers in it."""

    names: tuple[str, ...]

    def __init__(self, module: nn.Module, routing: Routing) -> None:
        super().__init__(module, routing)
        self.views = [_view_before(module.get_submodule(name)) for name in self.names]

    def layers(self) -> list[Layer] | None:
        """The linear layers with their side paths, where all are frozen and plain."""
        if self.routing.rows is not None:
            return None  # each row has side paths of its own
        if all_watched():
            return None
        found = []
        for name, view in zip(self.names, self.views, strict=True):
            module = self.module._modules.get(name)
            if not isinstance(view, LinearView) or module is not view.module or watched(module):
                return None
            layer = self._layer(view)
            if layer is None:
                return None
            found.append(layer)
        return found

    def _layer(self, view: LinearView) -> Layer | None:
        side = view.module._modules.get(CHILD)
        delta = None if side is None else side._modules.get(self.routing.key)
        if delta is None:
            return view.layer()
        assert isinstance(delta, Delta)
        factors = delta.factors()
        return None if factors is None else view.layer(*factors)


def _view_before(module: nn.Module) -> View | None:
    """The module as it was before side paths stood beside it, which they may do already."""
    side = module._modules.get(CHILD)
    return side.view if isinstance(side, SidePaths) else view_of(module)


def all_watched() -> bool:
    """Whether somebody waits for every module's own call."""
    return bool(_has_any_global_hook())  # type: ignore[no-untyped-call]


def watched(module: nn.Module) -> bool:
    """Whether somebody waits for this module's own call, which a fused pass would leave out."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
