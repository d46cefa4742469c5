"""The update of one module by one adapter: what every method's deltas have in common.

Dimensions: `...` any leading, O out, I in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sidepath.core.views import DenseView, View
from sidepath.errors import MergeError
from sidepath.kernels.routed import Factors
from sidepath.kernels.spectra import Thin


class Delta(nn.Module, ABC):
    """One adapter's change to one module of the base.

    A fresh delta leaves the module's output equal to the bit. Its parameters are the
    adapter's; it never holds, changes or registers a parameter of the base.
    """

    shares: bool = False
    """Whether deltas of this kind make the same of one tensor at every module that holds it."""
    reach: int = 0
    """Where the token ids end that it knows beyond the base's; 0 for none."""

    def forward(self, x: Tensor, base: View, *args: Any, **kwargs: Any) -> Tensor:
        """The adapted output for the module's input `x`."""
        return self.onto(base(x, *args, **kwargs), x, base)

    def fused(self, x: Tensor, base: View, *args: Any, **kwargs: Any) -> Tensor:
        """The adapted output by the fastest way there is; equal to `forward` up to rounding."""
        return self.forward(x, base, *args, **kwargs)

    @abstractmethod
    def onto(self, y: Tensor, x: Tensor, base: View) -> Tensor:
        """The adapted output, given the base's output `y` for `x`. `y` is not changed."""

    def factors(self) -> Factors | None:
        """`A (r, I)`, `B (O, r)` and `s`, if the output is just now `y + s B (A x)` and no more.

        Then it can be computed together with others: routed rows, layers of one input, whole
        blocks. None: `onto` is asked instead.
        """
        return None

    def thin(self) -> Thin | None:
        """The thin factors that the update of the matrix is made of, as they are saved; None where
        it is not made of such, or they are not trained.
        """
        return None

    @abstractmethod
    def folded(self, base: View, into: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The module's tensors with this delta folded in, by their name within the module.

        `into`: memory that may be written and given back for a tensor of that name.
        """

    @abstractmethod
    def touches(self, base: View) -> set[str]:
        """The names of the tensors that `folded` gives, without computing any."""

    def longer(self, base: View) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that `folded` gives in another one than the base's."""
        return {}

    def known(self, x: Tensor) -> Tensor:
        """What the base's module is called with for the input `x`: that, unless the base cannot
        take all of it.
        """
        return x

    def penalty(self) -> Tensor | None:
        """What training adds to each step's loss for the delta itself, whatever the data."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors, by their name within the delta."""
        return dict(self.named_parameters())

    @torch.no_grad()
    def take_(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the values of `tensors` into those of the same names, rounded to their dtype."""
        own = self.tensors()
        for local, tensor in tensors.items():
            own[local].copy_(tensor)


class LayerDelta(Delta):
    """A delta with layers of its own beside or behind the module: no weight of the base can take
    it in, so it stays apart in inference too.
    """

    def folded(self, base: View, into: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Errors: `MergeError`, always."""
        raise self._stays_apart(base)

    def touches(self, base: View) -> set[str]:
        """Errors: `MergeError`, always."""
        raise self._stays_apart(base)

    def _stays_apart(self, base: View) -> MergeError:
        return MergeError(
            f"{type(self).__name__} has layers of its own, which no weight of the base can take in",
            found=base.base_class.__name__,
            hint="keep the adapter apart: load it beside the base, or route rows to it",
        )


class WeightDelta(Delta):
    """A delta of the matrix: `onto(W0 x + b) = merged(W0) x + b`, whatever the layer's kind."""

    bias: nn.Parameter | None
    """The adapter's own bias in place of the module's, or None."""

    @abstractmethod
    def merged(self, W0_OI: Tensor, out_OI: Tensor | None = None) -> Tensor:
        """`W0 + ΔW`, accumulated in float32 (float64 for float64) and rounded once.

        Written into `out`, of `W0`'s shape and dtype, when that is given.
        """

    def folded(self, base: View, into: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        assert isinstance(base, DenseView)
        W0_OI = base.matrix()
        if W0_OI.dtype == base.weight.dtype:
            weight = _memory_like(base.weight, (into or {}).get("weight"))
            self.merged(W0_OI, base.as_matrix(weight))
        else:  # a packed layer: its matrix is made for this, its parameter cannot hold the result
            weight = base.from_matrix(self.merged(W0_OI))
        tensors = {"weight": weight}
        if self.bias is not None:
            tensors["bias"] = fold_bias(self.bias, base)
        return tensors

    def touches(self, base: View) -> set[str]:
        return {"weight"} if self.bias is None else {"weight", "bias"}


def _memory_like(tensor: Tensor, offered: Tensor | None) -> Tensor:
    """Contiguous memory for a tensor of this shape and dtype: what is offered, if it fits."""
    fits = (
        offered is not None
        and offered.shape == tensor.shape
        and offered.dtype == tensor.dtype
        and offered.device == tensor.device
        and offered.is_contiguous()
    )
    if fits and offered is not None:
        return offered
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where sums of this dtype are accumulated: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fold_bias(bias_O: Tensor, base: View) -> Tensor:
    """A trained bias in the dtype of the module's own."""
    own = base.module.bias
    assert isinstance(own, Tensor)
    return bias_O.detach().to(own.dtype)


def add_bias(y: Tensor, bias_O: Tensor, base: View) -> Tensor:
    """`y` with the module's bias replaced by a trained one: `y + (b' - b)`, exact at the start."""
    own = base.module.bias
    assert isinstance(own, Tensor)
    change_O = (bias_O - own).to(y.dtype)
    if isinstance(base, DenseView) and base.kind == "conv":
        return y + change_O.reshape(-1, *(1,) * (base.weight.dim() - 2))
    return y + change_O
