"""The low-rank delta of one matrix (Hu et al., 2021, section 4.1).

Dimensions: `...` any leading, O out, I in, R rank, N parts of a fused projection,
P adapted rows in all (O when the whole matrix is adapted).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidepath.core.delta import WeightDelta, accumulation_dtype, add_bias
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
from sidepath.kernels.spectra import Thin
from sidepath.methods.base import Saved
from sidepath.methods.bias import trained_bias
from sidepath.methods.starts import Find, best_factors, draw_


class AtPlace(NamedTuple):
    """LoRA's settings at one place, its patterns resolved."""

    r: int
    alpha: float
    scaling: float
    dropout: float
    with_bias: bool
    """Whether the layer's bias is trained as well."""
    dtype: torch.dtype
    """That of the factors."""


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
        settings: AtPlace,
        parts: tuple[Part, ...] = (),
        tensors: Saved = None,
    ) -> None:
        super().__init__()
        r, alpha, scaling, dropout, with_bias, dtype = settings
        whole = isinstance(view, LinearView) and not parts and not with_bias
        # Written where torch keeps them: a model has hundreds of these, and its `__setattr__`
        # looks through six tables each time.
        self.__dict__.update(
            r=r,
            alpha=alpha,
            scaling=scaling,
            dropout=dropout,
            parts=parts,
            kind=view.kind,
            bias=None,
            whole_linear=whole,
        )
        device = view.weight.device
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
        """Draw the random factor, A as `draw_` does; the other stays zero. In place.

        An embedding's B: N(0, 1).
        """
        if self.kind == "embedding":
            self.B.normal_()
        else:
            draw_(self.A, start, self.r)

    @torch.no_grad()
    def start_at_(self, M_OI: Tensor, find: Find = best_factors) -> None:
        """Start at factors of a matrix: with parts, of each part's rows. In place.

        With `best_factors` `s B A` is its best approximation of rank r in the Frobenius norm, but
        for its rounding to the factors' dtype.
        """
        M_OI = M_OI.to(accumulation_dtype(M_OI.dtype)) / self.scaling
        rows = self.parts or ((0, M_OI.shape[0]),)
        factors = [find(M_OI[start:stop], self.r) for start, stop in rows]
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
        A_NRI, B_PR = self.summed()
        if self.parts:
            return parts_matrix(A_NRI, B_PR, self.scaling, self.parts, rows, dtype)
        return product_matrix(A_NRI, B_PR, self.scaling, dtype)

    def summed(self) -> tuple[Tensor, Tensor]:
        """The factors whose product, scaled, is `ΔW`."""
        return self.A, self.B

    def thin(self) -> Thin:
        return Thin(*self.summed(), tuple(stop - start for start, stop in self.parts))

    @torch.no_grad()
    def merged(self, W0_OI: Tensor, out_OI: Tensor | None = None) -> Tensor:
        """`W0 + s B A` in one pass over `W0`; rows of no adapted part are copied."""
        if out_OI is None:
            out_OI = torch.empty_like(W0_OI)
        dtype = accumulation_dtype(W0_OI.dtype)
        parts = self.parts or ((0, W0_OI.shape[0]),)
        A_NRI, B_PR = self.summed()
        fold_parts(W0_OI, A_NRI.to(dtype), B_PR.to(dtype), self.scaling, parts, out_OI)
        return out_OI

    def extra_repr(self) -> str:
        """The line `print(model)` shows for this delta."""
        return f"r={self.r}, alpha={self.alpha:g}, scaling={self.scaling:g}"
