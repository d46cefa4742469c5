"""LoRA: a low-rank delta of each adapted matrix (Hu et al., 2021, section 4.1).

Dimensions: `...` any leading, O out, I in, R rank, N parts of a fused projection,
P adapted rows in all (O when the whole matrix is adapted).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidepath.config import check, require
from sidepath.core.delta import Delta, WeightDelta, accumulation_dtype, add_bias
from sidepath.core.views import DenseView, Kind, LinearView, View
from sidepath.kernels.dropout import Mask
from sidepath.kernels.folding import fold_parts
from sidepath.kernels.linear import SidePathLinears, beside
from sidepath.kernels.lowrank import (
    Part,
    add_parts,
    parts_matrix,
    product_matrix,
)
from sidepath.kernels.routed import Factors
from sidepath.methods.base import Method, Selection, Site
from sidepath.methods.bias import trained_bias
from sidepath.methods.starts import best_factors

MAX_RANK = 65_536


@dataclass(frozen=True)
class LoRA(Method):
    """`y = W0 x + s B (A x)`, `s = alpha/r`: A starts random, B at zero; only they are trained."""

    method = "lora"

    r: int = 8
    """Rank of each update: A is (r, in), B is (out, r)."""
    alpha: float = 16.0
    """The update is scaled by alpha/r."""
    dropout: float = 0.0
    """Dropout on the side path's input while training."""
    targets: tuple[str, ...] = ("all-linear",)
    """Modules to adapt: a preset (all-linear, attention, mlp), a name, a glob on the dotted
    name, or parts of a fused projection as in `c_attn:q,v`."""
    exclude: tuple[str, ...] = ()
    """Modules left out of the targets, in the same form."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Another rank for the modules that match a pattern; the last match wins."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Another alpha for the modules that match a pattern; the last match wins."""
    layers: tuple[int, ...] | None = None
    """Adapt only these blocks, counted from 0; all when not given."""
    bias: Literal["none", "all", "lora"] = "none"
    """Train no bias, every bias of the base, or those of the adapted layers."""
    train_whole: tuple[str, ...] = ()
    """Modules trained whole in a copy of the adapter's own, such as a classification head."""
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r"
    """The update's factor: the paper's, or the rank-stabilised one (Kalajdzievski, 2023)."""
    start: Literal["kaiming", "gaussian", "loftq"] = "kaiming"
    """How A starts: uniform as in the original code, or Gaussian as in the paper. `loftq`: over a
    quantised base, A and B start at what quantising took away, so that the first outputs are
    nearer to the unquantised base's (Li et al., 2023); its weights are read for that."""
    dtype: Literal["float32", "bfloat16", "float16", "base"] = "float32"
    """Data type of A and B; `base` takes that of the layer they stand beside."""

    def __post_init__(self) -> None:
        check(self)
        ranks, alphas = self.rank_pattern.values(), self.alpha_pattern.values()
        rules = {
            "r": 1 <= self.r <= MAX_RANK,
            "alpha": 0 < self.alpha <= 1e6,
            "dropout": 0 <= self.dropout < 1,
            "targets": len(self.targets) > 0,
            "rank_pattern": all(1 <= rank <= MAX_RANK for rank in ranks),
            "alpha_pattern": all(0 < alpha <= 1e6 for alpha in alphas),
            "layers": self.layers is None or (bool(self.layers) and min(self.layers) >= 0),
        }
        require(self, rules)

    def selection(self) -> Selection:
        patterns = (*self.rank_pattern, *self.alpha_pattern)
        return Selection(
            self.targets, self.exclude, self.layers, self.bias, self.train_whole, patterns
        )

    def rank_of(self, path: str) -> int:
        """The rank at a module's path, rank patterns considered."""
        if not self.rank_pattern:
            return self.r
        matches = [rank for key, rank in self.rank_pattern.items() if name_matches(key, path)]
        return matches[-1] if matches else self.r

    def alpha_of(self, path: str) -> float:
        """Alpha at a module's path, alpha patterns considered."""
        if not self.alpha_pattern:
            return self.alpha
        matches = [alpha for key, alpha in self.alpha_pattern.items() if name_matches(key, path)]
        return matches[-1] if matches else self.alpha

    def scaling_of(self, path: str) -> float:
        """The factor `s` at a module's path."""
        return self._factor(self.rank_of(path), self.alpha_of(path))

    def _factor(self, rank: int, alpha: float) -> float:
        return alpha / rank if self.scaling == "alpha/r" else alpha / math.sqrt(rank)

    def dense_delta(
        self, site: Site, view: DenseView, tensors: Mapping[str, Tensor] | None = None
    ) -> Delta:
        rank, alpha = self.rank_of(site.path), self.alpha_of(site.path)
        delta = LowRank(
            view,
            r=rank,
            alpha=alpha,
            scaling=self._factor(rank, alpha),
            dropout=self.dropout,
            parts=site.parts,
            with_bias=self.bias != "none" and view.bias is not None,
            dtype=None if self.dtype == "base" else getattr(torch, self.dtype),
            tensors=tensors,
        )
        if tensors is None:
            # What quantising took away is known where the unquantised weights are (`start_at_`).
            delta.start_("kaiming" if self.start == "loftq" else self.start)
        return delta


class LowRank(WeightDelta):
    """`ΔW = s B A` of one matrix; with parts, of some rows of a fused projection.

    `A` is (N r, I) and `B` is (P, r); without parts N = 1 and P = O. An embedding's `A`
    starts at zero and its `B` random, so that rows never looked up stay out of the product
    (as in the original code); everywhere else `B` starts at zero.
    """

    A: nn.Parameter
    B: nn.Parameter
    r: int
    alpha: float
    scaling: float
    dropout: float
    parts: tuple[Part, ...]
    kind: Kind

    def __init__(
        self,
        view: DenseView,
        *,
        r: int,
        alpha: float,
        scaling: float,
        dropout: float = 0.0,
        parts: tuple[Part, ...] = (),
        with_bias: bool = False,
        dtype: torch.dtype | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        # Written where torch keeps them: a model has hundreds of these, and its `__setattr__`
        # looks through six tables each time.
        self.__dict__ |= {"r": r, "alpha": alpha, "scaling": scaling, "dropout": dropout}
        whole = isinstance(view, LinearView) and not parts and not with_bias
        self.__dict__ |= {"parts": parts, "kind": view.kind, "bias": None, "whole_linear": whole}
        dtype, device = dtype or view.dtype, view.weight.device
        if tensors is None:
            rows, columns = view.shape
            adapted = sum(stop - start for start, stop in parts) if parts else rows
            A_RI = torch.zeros(r * max(1, len(parts)), columns, dtype=dtype, device=device)
            B_OR = torch.zeros(adapted, r, dtype=dtype, device=device)
        else:
            A_RI, B_OR = tensors["A"].to(device, dtype), tensors["B"].to(device, dtype)
        self._parameters["A"] = nn.Parameter(A_RI)
        self._parameters["B"] = nn.Parameter(B_OR)
        if with_bias:
            self.bias = trained_bias(view, None if tensors is None else tensors.get("bias"))

    @torch.no_grad()
    def start_(self, start: Literal["kaiming", "gaussian"]) -> None:
        """Draw the random factor; the other stays zero. In place.

        kaiming: U(-1/sqrt(I), 1/sqrt(I)) (the original code); gaussian: N(0, 1/r²) (the paper
        names no deviation; this is the one in common use). An embedding's B: N(0, 1).
        """
        if self.kind == "embedding":
            self.B.normal_()
        elif start == "gaussian":
            self.A.normal_(std=1.0 / self.r)
        else:
            bound = 1.0 / math.sqrt(self.A.shape[1])
            self.A.uniform_(-bound, bound)

    @torch.no_grad()
    def start_at_(self, M_OI: Tensor) -> None:
        """Start at the `ΔW` nearest to a matrix: with parts, nearest in each part's rows. In place.

        `s B A` is the best approximation of rank r in the Frobenius norm, but for its rounding to
        the factors' dtype.
        """
        rows = self.parts or ((0, M_OI.shape[0]),)
        factors = [best_factors(M_OI[start:stop] / self.scaling, self.r) for start, stop in rows]
        self.A.copy_(torch.cat([A_RI for A_RI, _ in factors]))
        self.B.copy_(torch.cat([B_OR for _, B_OR in factors]))

    def fused(self, x: Tensor, base: View, *args: Any, **kwargs: Any) -> Tensor:
        if not self.whole_linear:
            return self.forward(x, base, *args, **kwargs)
        assert isinstance(base, LinearView)
        A_RI, B_OR = self._parameters["A"], self._parameters["B"]
        assert A_RI is not None
        assert B_OR is not None
        dropout = self.dropout if self.training else 0.0
        if not (dropout or torch.is_grad_enabled()):
            return beside(x, base, A_RI, B_OR, self.scaling)
        layer = base.layer(A_RI, B_OR, self.scaling)
        if layer is None:
            return self.forward(x, base, *args, **kwargs)
        mask = Mask.drawn(dropout) if dropout else None
        ys = SidePathLinears.apply(x, (layer,), mask, A_RI, B_OR)  # type: ignore[no-untyped-call]
        return ys[0]  # type: ignore[no-any-return]

    def onto(self, y: Tensor, x: Tensor, base: View) -> Tensor:
        assert isinstance(base, DenseView)
        if self.dropout and self.training and x.is_floating_point():
            x = F.dropout(x, self.dropout)
        if self.parts:
            y = add_parts(y, x, self.A, self.B, self.scaling, self.parts)
        else:
            y = y + (base.product(x, self.A, self.B) * self.scaling).to(y.dtype)
        return y if self.bias is None else add_bias(y, self.bias, base)

    def factors(self) -> Factors | None:
        dropping = self.dropout and self.training
        return (self.A, self.B, self.scaling) if self.whole_linear and not dropping else None

    def matrix(self, rows: int, dtype: torch.dtype) -> Tensor:
        """`ΔW` as a (rows, I) matrix; `rows` is the module's O."""
        if self.parts:
            return parts_matrix(self.A, self.B, self.scaling, self.parts, rows, dtype)
        return product_matrix(self.A, self.B, self.scaling, dtype)

    @torch.no_grad()
    def merged(self, W0_OI: Tensor, out_OI: Tensor | None = None) -> Tensor:
        """`W0 + s B A` in one pass over `W0`; rows of no adapted part are copied."""
        if out_OI is None:
            out_OI = torch.empty_like(W0_OI)
        dtype = accumulation_dtype(W0_OI.dtype)
        parts = self.parts or ((0, W0_OI.shape[0]),)
        fold_parts(W0_OI, self.A.to(dtype), self.B.to(dtype), self.scaling, parts, out_OI)
        return out_OI

    def extra_repr(self) -> str:
        """The line `print(model)` shows for this delta."""
        return f"r={self.r}, alpha={self.alpha:g}, scaling={self.scaling:g}"


def name_matches(pattern: str, path: str) -> bool:
    """Whether a target pattern names the module at `path`.

    A pattern without a dot is held against the path's last part; one with a dot against the
    whole path or any tail of it that starts at a dot. `*`, `?` and `[...]` are globs.
    """
    if "." not in pattern:
        return fnmatchcase(path.rpartition(".")[2], pattern)
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")
