"""A low-rank delta that starts at the weight's own factors: PiSSA and OLoRA, beside a base that
is never changed.

Dimensions: O out, I in, R rank, N parts of a fused projection, P adapted rows in all.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sidepath.core.delta import add_bias
from sidepath.core.views import DenseView, View
from sidepath.kernels.lowrank import Part, add_parts
from sidepath.kernels.routed import Factors
from sidepath.methods.base import Saved
from sidepath.methods.lowrank import AtPlace, LowRank
from sidepath.methods.starts import best_factors, first_factors


class Rebased(LowRank):
    """`ΔW = s (B A - B0 A0)`: A and B start at `A0, B0`, with `s B0 A0` a part of `W0`.

    PiSSA (Meng et al., 2024, section 3): the r largest singular directions. OLoRA (Büyükakyüz,
    2024, section 3): `W0 = Q R`, `B0` the first r columns of Q and `A0` the first r rows of R.
    Both papers take `s B0 A0` off the base's weights; here the base stays and the product is taken
    off the side path, which is the same sum. The two products of a fresh delta are computed alike,
    so that their difference is zero to the bit. `tensors` gives the same update as plain LoRA of
    rank 2r, `[B, B0] [A; -A0]`, which is the form that is saved.
    """

    A0: Tensor
    B0: Tensor

    def __init__(
        self,
        view: DenseView,
        settings: AtPlace,
        start: Literal["pissa", "olora"],
        parts: tuple[Part, ...] = (),
        tensors: Saved = None,
    ) -> None:
        super().__init__(view, settings, parts, tensors)
        # The fused kernels know one product beside a layer.
        self.__dict__["whole_linear"] = False
        if tensors is None:
            self.start_at_(view.matrix(), best_factors if start == "pissa" else first_factors)
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())

    def factors(self) -> Factors | None:
        return None

    def onto(self, y: Tensor, x: Tensor, base: View) -> Tensor:
        assert isinstance(base, DenseView)
        if self.dropout and self.training and x.is_floating_point():
            x = F.dropout(x, self.dropout)
        if self.parts:
            zero = torch.zeros_like(y)
            now = add_parts(zero, x, self.A, self.B, self.scaling, self.parts)
            then = add_parts(zero, x, self.A0, self.B0, self.scaling, self.parts)
            y = y + (now - then)
        else:
            change = base.product(x, self.A, self.B) - base.product(x, self.A0, self.B0)
            y = y + (change * self.scaling).to(y.dtype)
        return y if self.bias is None else add_bias(y, self.bias, base)

    def summed(self) -> tuple[Tensor, Tensor]:
        """Of rank 2r: `[A; -A0]`, part by part, and `[B, B0]`."""
        stacked = (len(self.parts) or 1, -1, self.A.shape[1])
        A_NRI = torch.cat([self.A.view(stacked), -self.A0.view(stacked)], dim=1)
        return A_NRI.flatten(0, 1), torch.cat([self.B, self.B0], dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors in the form of plain LoRA of rank 2r."""
        A_NRI, B_PR = self.summed()
        return {**super().tensors(), "A": A_NRI, "B": B_PR}
