"""Several adapters on one model answering together: the sum of their updates (floor 4).

Dimensions: O out, I in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sidepath.core.delta import Delta, accumulation_dtype
from sidepath.core.views import DenseView, View
from sidepath.errors import MergeError
from sidepath.injection.registry import Installed, require_registry
from sidepath.injection.surgery import activate
from sidepath.methods.bias import BiasOnly
from sidepath.methods.lowrank import LowRank

TOGETHER = "together"


class Sum(Delta):
    """Several adapters' deltas of one module, added up: `y + Σ (onto_i - y)`."""

    def __init__(self, deltas: Sequence[Delta]) -> None:
        super().__init__()
        self.deltas = nn.ModuleList(deltas)

    def forward(self, x: Tensor, base: View, *args: Any, **kwargs: Any) -> Tensor:
        if len(self.deltas) == 1:
            only: Tensor = self.deltas[0](x, base, *args, **kwargs)
            return only
        return super().forward(x, base, *args, **kwargs)

    @property
    def shares(self) -> bool:  # type: ignore[override]
        """Whether all of them do."""
        return all(cast(Delta, delta).shares for delta in self.deltas)

    @property
    def reach(self) -> int:  # type: ignore[override]
        """The furthest of theirs."""
        return max(cast(Delta, delta).reach for delta in self.deltas)

    def known(self, x: Tensor) -> Tensor:
        for delta in self.deltas:
            x = cast(Delta, delta).known(x)
        return x

    def longer(self, base: View) -> dict[str, tuple[int, ...]]:
        return {
            name: shape
            for delta in self.deltas
            for name, shape in cast(Delta, delta).longer(base).items()
        }

    def onto(self, y: Tensor, x: Tensor, base: View) -> Tensor:
        for delta in self.deltas:
            assert isinstance(delta, Delta)
            y = delta.onto(y, x, base)
        return y

    @torch.no_grad()
    def folded(self, base: View, into: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The module's tensors with `W0 + Σ ΔW_i` and `b + Σ (b_i - b)`, in `W0`'s dtype."""
        deltas = [delta for delta in self.deltas if isinstance(delta, Delta)]
        if len(deltas) == 1:
            return deltas[0].folded(base, into)
        tensors = {}
        matrices = [delta for delta in deltas if isinstance(delta, LowRank)]
        if matrices:
            assert isinstance(base, DenseView)
            W0_OI = base.matrix()
            W_OI = W0_OI.to(accumulation_dtype(W0_OI.dtype), copy=True)
            for delta in matrices:
                delta.merged(W_OI, W_OI)
            tensors["weight"] = base.from_matrix(W_OI.to(W0_OI.dtype))
        biases = [delta.bias for delta in deltas if isinstance(delta.bias, Tensor)]
        if biases:
            own = base.module.bias
            assert isinstance(own, Tensor)
            tensors["bias"] = own + torch.stack([bias - own for bias in biases]).sum(0)
        return tensors

    def touches(self, base: View) -> set[str]:
        return set().union(*(cast(Delta, delta).touches(base) for delta in self.deltas))


def add_up(model: nn.Module, names: Sequence[str]) -> str:
    """Let the sum of the loaded adapters answer; returns its name. Changes `model` in place.

    Errors: `MergeError` when two of them train the same module whole.
    """
    registry = require_registry(model)
    parts: dict[str, list[Delta]] = {}
    for name in names:
        for path, delta in registry.adapters[name].deltas.items():
            parts.setdefault(path, []).append(delta)
    twice = [path for path, deltas in parts.items() if len(deltas) > 1 and _replaces(deltas)]
    if twice:
        raise MergeError(
            "several adapters train the same module whole, or rows for tokens there: their sum "
            "means nothing",
            faults=twice,
        )
    sums = {path: Sum(deltas) for path, deltas in parts.items()}
    for path, delta in sums.items():
        registry.sides[path].add(TOGETHER, delta)
    parts_of = [registry.adapters[name] for name in names]
    tokens = {text: i for one in parts_of for text, i in one.tokens.items()}
    registry.adapters[TOGETHER] = Installed(TOGETHER, parts_of[0].config, {}, dict(sums), tokens)
    activate(model, TOGETHER)
    return TOGETHER


def _replaces(deltas: Sequence[Delta]) -> bool:
    return not all(isinstance(delta, LowRank | BiasOnly) for delta in deltas)
