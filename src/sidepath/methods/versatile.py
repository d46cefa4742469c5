"""VersatileLM: one adapter behind each whole block, and a task embedding (Lin et al., 2020).

Dimensions: `...` any leading, D width of the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sidepath.config import check, require
from sidepath.core.delta import Delta, LayerDelta
from sidepath.core.views import DenseView, View
from sidepath.methods.base import Dtype, Method, Saved, Selection, Site, dtype_of, filled
from sidepath.methods.bottleneck import MAX_SIZE, AdapterLayer, device_of


@dataclass(frozen=True)
class VersatileLM(Method):
    """`h + Up(relu(Down(LN(h))))` on each block's output `h`, and `e` onto each token's embedding.

    Parameters: `2 D R + R + D + 2 D` a block, and D for the task embedding (Lin et al., 2020;
    their segment embedding of the task, which every token gets). Where encoder and decoder look
    tokens up in tables of their own there is one embedding each.
    """

    method = "versatile-lm"

    size: int = 100
    """Width of the bottleneck; the paper takes 10 to 300 by task."""
    task_embedding: bool = True
    """Whether a vector of the task's own is added to every token's embedding."""
    start: Literal["zero", "near-identity"] = "zero"
    """`zero`: nothing changes before the first step; `near-identity`: small and normal (0.02)."""
    dtype: Dtype = "float32"
    """Data type of what is trained; `base` takes that of the module it stands beside."""
    train_whole: tuple[str, ...] = ()
    """Modules trained whole in a copy of the adapter's own, such as a classification head."""

    def __post_init__(self) -> None:
        check(self)
        require(self, {"size": 1 <= self.size <= MAX_SIZE})

    def selection(self) -> Selection:
        targets = ("blocks", *(("token-embedding",) if self.task_embedding else ()))
        return Selection(targets, train_whole=self.train_whole)

    def dense_delta(self, site: Site, view: DenseView, tensors: Saved = None) -> Delta:
        deviation = 0.02 if self.start == "near-identity" else 0.0
        return filled(
            lambda: TaskEmbedding(view, dtype_of(self.dtype, view), 0.0 if tensors else deviation),
            tensors,
        )

    def module_delta(self, site: Site, view: View, tensors: Saved = None) -> Delta:
        def made() -> Delta:
            dtype = dtype_of(self.dtype, view)
            delta = AdapterLayer(view, size=self.size, activation="relu", norm=True, dtype=dtype)
            if tensors is None:
                delta.start_(0.02 if self.start == "near-identity" else None)
            return delta

        return filled(made, tensors)


class TaskEmbedding(LayerDelta):
    """`y + e`: one trained vector `e (D)` onto every token's embedding; it starts at zero."""

    def __init__(self, view: DenseView, dtype: torch.dtype, deviation: float = 0.0) -> None:
        super().__init__()
        self.task = nn.Parameter(torch.zeros(view.shape[0], dtype=dtype, device=device_of(view)))
        if deviation:
            nn.init.normal_(self.task, std=deviation)

    def onto(self, y: Tensor, x: Tensor, base: View) -> Tensor:
        return y + self.task.to(y.dtype)
