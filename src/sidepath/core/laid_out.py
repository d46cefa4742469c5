"""A base whose linear layers are laid out for few rows, while it answers and nobody trains it.

Each layer keeps its matrix, which merging, fingerprints and deltas read, and beside it a copy in
blocks that multiplies (`kernels/blocked.py`): as many bytes once more.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sidepath.core.adapted import CHILD, SidePaths
from sidepath.core.views import LinearView, PackedView, View, view_of
from sidepath.kernels import blocked
from sidepath.kernels.checked import TRIALS, Key, Verdict

KERNEL = "blocked"


class LaidOut:
    """What a linear layer calls in the place of its class's forward: `y = W0 x + b`."""

    def __init__(self, view: LinearView) -> None:
        self.view = view
        self.stale = True
        """Whether the weights may have changed since `lay`."""
        self.laid_OI: Tensor | None = None
        """The copy in blocks, where such products agreed with the plain one."""

    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.dtype != self.view.dtype or not x.numel():
            return self._own(x)
        if self.stale:
            self.lay()
        if self.laid_OI is None:
            return self._own(x)
        return blocked.product(x, self.laid_OI, self.view.bias)

    def __deepcopy__(self, memo: dict[int, object]) -> LaidOut:
        """Of a copied layer, for that layer; oneDNN's tensors cannot be copied."""
        return LaidOut(copy.deepcopy(self.view, memo))

    @torch.no_grad()
    def lay(self) -> None:
        """Make the copy; the first of each shape is held against the layer's own product."""
        self.stale, self.laid_OI = False, None
        matrix, bias = self.view.matrix().detach(), self.view.bias
        key = Key(KERNEL, (matrix.dtype,), tuple(matrix.shape))
        if KERNEL in TRIALS.barred:
            return
        laid_OI, rows = blocked.lay_out(matrix), matrix[:8]
        TRIALS.run(key, lambda: blocked.product(rows, laid_OI, bias), lambda: self._own(rows))
        if TRIALS.verdicts.get(key) is Verdict.FAST:
            self.laid_OI = laid_OI

    def _own(self, x: Tensor) -> Tensor:
        y: Tensor = self.view.base_class.forward(self.view.module, x)
        return y


def lay_out(model: nn.Module) -> None:
    """Let every linear layer of a model be laid out that can be; the others stay as they are. In
    place, undone by `put_back`; adapters may come and go meanwhile.

    Not those that are packed into 4 bits, that have a forward of their own, or that a processor has
    no such product for (`kernels.blocked.lays_out`).
    """
    for module in model.modules():
        side = module._modules.get(CHILD)
        view = side.view if isinstance(side, SidePaths) else view_of(module)
        if not isinstance(view, LinearView) or isinstance(view, PackedView):
            continue
        if view.own_forward is not None or not view.as_known or not blocked.lays_out(view.weight):
            continue
        laid = LaidOut(view)
        laid.lay()
        if isinstance(side, SidePaths):
            view.own_forward = laid
        else:
            module.__dict__["forward"] = laid


def renew(model: nn.Module) -> None:
    """Lay out anew, at the next calls: the weights have changed. In place."""
    for _, _, laid in _laid_out(model):
        laid.stale = True


def put_back(model: nn.Module) -> None:
    """Undo `lay_out`. In place."""
    for module, view, _ in _laid_out(model):
        if view is not None:
            view.own_forward = None
        module.__dict__.pop("forward", None)


def _laid_out(model: nn.Module) -> Iterator[tuple[nn.Module, View | None, LaidOut]]:
    """The layers with their views, where they have side paths, and what they call."""
    for module in model.modules():
        side = module._modules.get(CHILD)
        view = side.view if isinstance(side, SidePaths) else None
        laid = module.__dict__.get("forward") if view is None else view.own_forward
        if isinstance(laid, LaidOut):
            yield module, view, laid
