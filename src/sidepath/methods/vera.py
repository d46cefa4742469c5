"""VeRA: random factors shared by all layers, and two trained vectors beside each matrix.

Kopiczko et al., 2024 (arXiv 2310.11454), section 3.

Dimensions: `...` any leading, O out, I in, R rank, N parts of a fused projection,
P adapted rows in all (O when the whole matrix is adapted).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidepath.config import check, require
from sidepath.core.delta import Delta, WeightDelta, accumulation_dtype
from sidepath.core.views import DenseView, View
from sidepath.kernels.folding import fold_parts
from sidepath.kernels.lowrank import Part, add_parts
from sidepath.methods.base import (
    AllSaved,
    Dtype,
    Method,
    Saved,
    Selection,
    Site,
    Views,
    dtype_of,
    filled,
)

MAX_RANK = 65_536
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class VeRA(Method):
    """`y = W0 x + b * B (d * A x)`: A and B random, frozen and the same for all layers (they follow
    from `projection_seed`); the vectors d and b are trained and saved, `r + out` numbers a matrix.
    """

    method = "vera"

    r: int = 256
    """Rank of the shared random factors; a rank of hundreds costs few parameters."""
    projection_seed: int = 0
    """What A and B are drawn from; saved in the place of them."""
    d_start: float = 0.1
    """Where each number of d starts; b starts at zero."""
    dropout: float = 0.0
    """Dropout on the side path's input while training."""
    targets: tuple[str, ...] = ("all-linear",)
    """Modules to adapt, in the form of LoRA's targets."""
    exclude: tuple[str, ...] = ()
    """Modules left out of the targets, in the same form."""
    layers: tuple[int, ...] | None = None
    """Adapt only these blocks, counted from 0; all when not given."""
    train_whole: tuple[str, ...] = ()
    """Modules trained whole in a copy of the adapter's own, such as a classification head."""
    dtype: Dtype = "float32"
    """Data type of d, b, A and B; `base` takes that of the layer they stand beside."""

    def __post_init__(self) -> None:
        check(self)
        rules = {
            "r": 1 <= self.r <= MAX_RANK,
            "projection_seed": 0 <= self.projection_seed <= MAX_SEED,
            "d_start": self.d_start != 0,
            "dropout": 0 <= self.dropout < 1,
            "targets": len(self.targets) > 0,
            "layers": self.layers is None or (bool(self.layers) and min(self.layers) >= 0),
        }
        require(self, rules)

    def selection(self) -> Selection:
        return Selection(self.targets, self.exclude, self.layers, train_whole=self.train_whole)

    def deltas(
        self, sites: Iterable[Site], views: Views, tensors: AllSaved = None
    ) -> dict[str, Delta]:
        """See `Method.deltas`: the factors are drawn once, as large as the largest layer's."""
        found = super().deltas(sites, views, tensors)
        share(
            [delta for delta in found.values() if isinstance(delta, Vectors)], self.projection_seed
        )
        return found

    def dense_delta(self, site: Site, view: DenseView, tensors: Saved = None) -> Delta:
        dtype = dtype_of(self.dtype, view)
        made = (self.r, self.d_start, self.dropout, site.parts, dtype)
        delta = filled(lambda: Vectors(view, *made), tensors)
        assert isinstance(delta, Vectors)
        share([delta], self.projection_seed)
        return delta


class Vectors(WeightDelta):
    """`ΔW = s diag(b) B diag(d) A` of one matrix; with parts, of some rows of a fused projection.

    `d` is (N R) and `b` is (P). A and B hold numbers within (-1, 1) and `s = 6 / sqrt(I R)`, which
    makes them the Kaiming-uniform ones of the paper whatever the layer's width. They are buffers
    that no file and no checkpoint holds: they follow from the seed.
    """

    A: Tensor
    B: Tensor

    def __init__(
        self,
        view: DenseView,
        r: int,
        d_start: float,
        dropout: float,
        parts: tuple[Part, ...],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        rows, columns = view.shape
        self.parts, self.dropout, self.bias = parts, dropout, None
        self.shape = (r, sum(stop - start for start, stop in parts) if parts else rows, columns)
        self.scaling = 6.0 / math.sqrt(r * columns)
        device = view.weight.device
        self.d = nn.Parameter(torch.full((r * (len(parts) or 1),), d_start).to(device, dtype))
        self.b = nn.Parameter(torch.zeros(self.shape[1], dtype=dtype, device=device))

    def scaled(self) -> tuple[Tensor, Tensor]:
        """`diag(d) A (N R, I)`, part by part, and `diag(b) B (P, R)`."""
        A_NRI = self.d.view(-1, self.shape[0], 1) * self.A
        return A_NRI.flatten(0, 1), self.b[:, None] * self.B

    def onto(self, y: Tensor, x: Tensor, base: View) -> Tensor:
        assert isinstance(base, DenseView)
        if self.dropout and self.training and x.is_floating_point():
            x = F.dropout(x, self.dropout)
        A_NRI, B_PR = self.scaled()
        if self.parts:
            return add_parts(y, x, A_NRI, B_PR, self.scaling, self.parts)
        return y + (base.product(x, A_NRI, B_PR) * self.scaling).to(y.dtype)

    @torch.no_grad()
    def merged(self, W0_OI: Tensor, out_OI: Tensor | None = None) -> Tensor:
        """`W0 + s diag(b) B diag(d) A`; rows of no adapted part are copied."""
        out_OI = torch.empty_like(W0_OI) if out_OI is None else out_OI
        dtype = accumulation_dtype(W0_OI.dtype)
        A_NRI, B_PR = (factor.to(dtype) for factor in self.scaled())
        parts = self.parts or ((0, W0_OI.shape[0]),)
        fold_parts(W0_OI, A_NRI, B_PR, self.scaling, parts, out_OI)
        return out_OI

    def extra_repr(self) -> str:
        """The line `print(model)` shows for this delta."""
        return f"r={self.shape[0]}"


def share(deltas: list[Vectors], seed: int) -> None:
    """Give deltas the random factors of a seed: one pair, of which each has its own part.

    In place. A layer's part does not depend on which other layers there are: I columns of A are
    the first I R numbers of one stream, P rows of B the first P R of another.
    """
    drawn: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}
    for delta in deltas:
        key = (delta.shape[0], delta.b.dtype, delta.b.device)
        if key not in drawn:
            alike = [d.shape for d in deltas if (d.shape[0], d.b.dtype, d.b.device) == key]
            widest = max(columns for _, _, columns in alike)
            tallest = max(rows for _, rows, _ in alike)
            A_IR, B_PR = uniform(seed, 0, widest, key[0]), uniform(seed, 1, tallest, key[0])
            drawn[key] = (A_IR.to(delta.b).T, B_PR.to(delta.b))
        A_RI, B_PR = drawn[key]
        delta.register_buffer("A", A_RI[:, : delta.shape[2]], persistent=False)
        delta.register_buffer("B", B_PR[: delta.shape[1]], persistent=False)


def uniform(seed: int, stream: int, rows: int, columns: int) -> Tensor:
    """(rows, columns) float64 numbers of U(-1, 1), the same on every machine and version.

    From numpy's `RandomState`, whose numbers are frozen: a saved adapter depends on them.
    """
    import numpy as np

    numbers = np.random.RandomState([seed, stream]).random_sample((rows, columns))
    return torch.tensor(numbers * 2 - 1, dtype=torch.float64)
