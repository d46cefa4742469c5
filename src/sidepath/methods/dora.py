"""DoRA: a matrix's direction and magnitude, trained apart (Liu et al., 2024, section 4).

Dimensions: `...` any leading, O out, I in, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidepath.core.delta import WeightDelta, accumulation_dtype, add_bias
from sidepath.core.views import DenseView, LinearView, View
from sidepath.errors import UnsupportedModule
from sidepath.kernels.lowrank import low_rank
from sidepath.kernels.spectra import Thin
from sidepath.methods.base import Saved, Site, Views
from sidepath.methods.bias import trained_bias
from sidepath.methods.lowrank import AtPlace
from sidepath.methods.starts import draw_


class Dora(WeightDelta):
    """`W' = m (W0 + s B A) / ‖W0 + s B A‖`, the norm of each row; `m (O)`, `A (R, I)`, `B (O, R)`.

    `m` starts at the row norms of `W0`, so that a fresh delta changes nothing. As in the paper
    (section 4.3) the norm counts as a constant in the backward pass. `m` is float32 (float64 beside
    a float64 layer) whatever A and B are, since a rounded norm would not give `W0` back. A row of
    zeros has no direction: it is divided by nothing. Dropout acts on the low-rank product's input.
    """

    A: nn.Parameter
    B: nn.Parameter
    magnitude: nn.Parameter

    def __init__(self, view: DenseView, settings: AtPlace, tensors: Saved = None) -> None:
        super().__init__()
        assert isinstance(view, LinearView)
        self.r, self.alpha, self.scaling, self.dropout, with_bias, dtype = settings
        device = view.weight.device
        own = accumulation_dtype(view.dtype)
        rows, columns = view.shape
        if tensors is None:
            self.A = nn.Parameter(torch.zeros(self.r, columns, dtype=dtype, device=device))
            self.B = nn.Parameter(torch.zeros(rows, self.r, dtype=dtype, device=device))
            self.magnitude = nn.Parameter(self._norm(view.matrix()).to(own))
        else:
            self.A = nn.Parameter(tensors["A"].to(device, dtype))
            self.B = nn.Parameter(tensors["B"].to(device, dtype))
            self.magnitude = nn.Parameter(tensors["magnitude"].to(device, own))
        self.bias = None
        if with_bias:
            self.bias = trained_bias(view, None if tensors is None else tensors.get("bias"))

    @torch.no_grad()
    def start_(self, start: Literal["kaiming", "gaussian"]) -> None:
        """Draw A; B stays zero. In place."""
        draw_(self.A, start, self.r)

    @torch.no_grad()
    def direction(self, W0_OI: Tensor) -> Tensor:
        """`W0 + s B A`, accumulated in float32 (float64 for float64)."""
        dtype = accumulation_dtype(W0_OI.dtype)
        V_OI: Tensor = torch.addmm(
            W0_OI.to(dtype), self.B.to(dtype), self.A.to(dtype), alpha=self.scaling
        )
        return V_OI

    def _norm(self, W0_OI: Tensor) -> Tensor:
        norm_O: Tensor = torch.linalg.vector_norm(self.direction(W0_OI), dim=1)
        return norm_O

    def factor(self, norm_O: Tensor) -> Tensor:
        """`m / ‖W0 + s B A‖` (O), exactly 1 for a fresh delta; 1 where the norm is 0."""
        some = norm_O > 0
        return torch.where(some, self.magnitude / norm_O.where(some, torch.ones_like(norm_O)), 1.0)

    def onto(self, y: Tensor, x: Tensor, base: View) -> Tensor:
        """`y + (g - 1)(y - b) + g s B (A x)` with `g = m / ‖W0 + s B A‖`."""
        assert isinstance(base, DenseView)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        factor_O = self.factor(self._norm(base.matrix()))
        product = y if base.bias is None else y - base.bias
        change = (factor_O - 1) * product + factor_O * self.scaling * low_rank(x, self.A, self.B)
        y = y + change.to(y.dtype)
        return y if self.bias is None else add_bias(y, self.bias, base)

    def thin(self) -> Thin:
        """Those of the direction's update `s B A`; the matrix's own is no product of such."""
        return Thin(self.A, self.B)

    @torch.no_grad()
    def merged(self, W0_OI: Tensor, out_OI: Tensor | None = None) -> Tensor:
        """`m (W0 + s B A) / ‖W0 + s B A‖`: its rows have the norms |m|."""
        W_OI = self.direction(W0_OI)
        W_OI *= self.factor(torch.linalg.vector_norm(W_OI, dim=1))[:, None]
        out_OI = torch.empty_like(W0_OI) if out_OI is None else out_OI
        return out_OI.copy_(W_OI)

    def extra_repr(self) -> str:
        """The line `print(model)` shows for this delta."""
        return f"r={self.r}, alpha={self.alpha:g}, scaling={self.scaling:g}"


def why_not(view: View | None, site: Site) -> str | None:
    """Why DoRA cannot stand at a dense site; None where it can."""
    if not isinstance(view, LinearView):
        kind = "a module without a matrix" if not isinstance(view, DenseView) else view.kind
        return (
            f"DoRA scales the rows of a linear layer's matrix, and this is {kind}: the paper "
            "defines no magnitude for it"
        )
    if site.parts:
        return "DoRA's norms are those of whole rows' layers: parts of a fused projection have none"
    return None


def refuse(sites: Iterable[Site], views: Views) -> None:
    """Raise one `UnsupportedModule` that names every dense site DoRA cannot take."""
    faults = [
        f"{site.path}: {reason}"
        for site in sites
        if site.kind == "dense" and (reason := why_not(views[site.path], site))
    ]
    if faults:
        raise UnsupportedModule(
            "DoRA adapts whole linear layers alone",
            faults=faults,
            hint="leave these modules out of the targets, or set dora to false",
        )
