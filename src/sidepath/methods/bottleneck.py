"""Adapter layers: a small network on what the base's layers write into the residual stream.

Dimensions: `...` any leading, D width of the residual stream, R bottleneck.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidepath.config import check, require
from sidepath.core.delta import Delta, LayerDelta
from sidepath.core.views import DenseView, View, view_of
from sidepath.errors import UnsupportedModule
from sidepath.methods.base import Dtype, Method, Saved, Selection, Site, dtype_of, filled

MAX_SIZE = 65_536

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class Kind(NamedTuple):
    """What tells one paper's adapters from another's."""

    targets: tuple[str, ...]
    activation: str
    deviation: float
    """Standard deviation of a near-identity start."""
    norm: bool
    """Whether a LayerNorm of the adapter's own comes first."""


KINDS: Mapping[str, Kind] = {
    "houlsby": Kind(("attention-output", "mlp-output"), "gelu", 0.01, False),
    "pfeiffer": Kind(("mlp-output",), "relu", 0.02, False),
    "lin": Kind(("mlp-output",), "relu", 0.02, True),
}


@dataclass(frozen=True)
class Bottleneck(Method):
    """`y + s Up(act(Down(y)))` on what a block's sublayers write, before the residual addition.

    Parameters of one adapter: `2 D R + R + D`, and `2 D` more with a LayerNorm. Houlsby et al.
    (2019) also train the base's LayerNorms: `train_whole=("layer.*.LayerNorm",)` does so in BERT.
    In a mixture of experts the MLP's adapter stands on the sum that the whole mixture gives.
    """

    method = "bottleneck"

    kind: Literal["houlsby", "pfeiffer", "lin"] = "houlsby"
    """Where adapters stand: behind every attention and MLP (Houlsby et al., 2019), behind the MLP
    only (Pfeiffer et al., 2021), or there with a LayerNorm first (Lin et al., 2020, as the LoRA
    paper has it)."""
    size: int = 64
    """Width of the bottleneck."""
    activation: Literal["paper", "relu", "gelu", "silu", "tanh"] = "paper"
    """Between the two layers; `paper`: gelu for houlsby (the released code's), relu for others."""
    scale: float = 1.0
    """Factor of the adapter's output."""
    parallel: bool = False
    """The adapter reads the MLP's input instead of its output (He et al., 2022). It then stands
    beside the MLP as a whole, so the MLP must be a module; kinds pfeiffer and lin only, since an
    attention's whole module gives more than its output."""
    drop: int = 0
    """No adapter in the first so many blocks (AdapterDrop: Rueckle et al., 2021)."""
    start: Literal["zero", "near-identity"] = "zero"
    """`zero`: the second layer is zero, so that nothing changes before the first step;
    `near-identity`: both are small and normal, as in the papers (houlsby: deviation 0.01, cut at
    two; others 0.02)."""
    dtype: Dtype = "float32"
    """Data type of the adapters; `base` takes that of the module they stand beside."""
    train_whole: tuple[str, ...] = ()
    """Modules trained whole in a copy of the adapter's own, such as a classification head."""

    def __post_init__(self) -> None:
        check(self)
        rules = {
            "size": 1 <= self.size <= MAX_SIZE,
            "scale": 0 < abs(self.scale) <= 1e6,
            "parallel": not self.parallel or self.kind != "houlsby",
            "drop": self.drop >= 0,
        }
        require(self, rules)

    def selection(self) -> Selection:
        targets = ("mlp-module",) if self.parallel else KINDS[self.kind].targets
        blocks = (self.drop or None, None)
        return Selection(targets, blocks=blocks, train_whole=self.train_whole)

    def module_delta(self, site: Site, view: View, tensors: Saved = None) -> Delta:
        kind = KINDS[self.kind]

        def made() -> Delta:
            delta = AdapterLayer(
                view,
                size=self.size,
                activation=kind.activation if self.activation == "paper" else self.activation,
                scale=self.scale,
                norm=kind.norm,
                parallel=self.parallel,
                dtype=dtype_of(self.dtype, view),
            )
            if tensors is None:
                near = self.start == "near-identity"
                delta.start_(kind.deviation if near else None, cut=self.kind == "houlsby")
            return delta

        return filled(made, tensors)


class StreamDelta(LayerDelta):
    """A delta of what a module gives: a matrix, or any module that gives a tensor (..., D), or a
    tuple that begins with one.
    """

    def forward(self, x: Tensor, base: View, *args: Any, **kwargs: Any) -> Tensor:
        y: Any = base(x, *args, **kwargs)
        if isinstance(y, tuple):
            return (self.onto(y[0], x, base), *y[1:])  # type: ignore[return-value]
        return self.onto(y, x, base)


class AdapterLayer(StreamDelta):
    """`y + s Up(act(Down(h)))`: `h` is the output `y`, its LayerNorm, or the module's input.

    `down` is (R, D) with `down_bias (R)`, `up` is (D, R) with `up_bias (D)`; with a LayerNorm
    `norm (D)` and `norm_bias (D)`.
    """

    size: int
    activation: str
    scale: float
    parallel: bool

    def __init__(
        self,
        view: View,
        *,
        size: int,
        activation: str,
        scale: float = 1.0,
        norm: bool = False,
        parallel: bool = False,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.size, self.activation, self.scale, self.parallel = size, activation, scale, parallel
        width = stream_width(view)
        where: dict[str, Any] = {"dtype": dtype, "device": device_of(view)}
        self.down = nn.Parameter(torch.zeros(size, width, **where))
        self.down_bias = nn.Parameter(torch.zeros(size, **where))
        self.up = nn.Parameter(torch.zeros(width, size, **where))
        self.up_bias = nn.Parameter(torch.zeros(width, **where))
        self.norm = nn.Parameter(torch.ones(width, **where)) if norm else None
        self.norm_bias = nn.Parameter(torch.zeros(width, **where)) if norm else None

    @torch.no_grad()
    def start_(self, deviation: float | None, *, cut: bool = False) -> None:
        """Draw the start. In place; biases stay zero.

        None: `down` uniform in ±1/sqrt(D), `up` zero, so that the module's output is unchanged to
        the bit. Else both are N(0, deviation²), with `cut` drawn again beyond two deviations.
        """
        if deviation is None:
            bound = 1 / math.sqrt(self.down.shape[1])
            self.down.uniform_(-bound, bound)
            return
        for weight in (self.down, self.up):
            if cut:
                nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)
            else:
                weight.normal_(std=deviation)

    def update(self, h: Tensor, *, frozen: bool = False) -> Tensor:
        """What the adapter adds for `h`, in its own dtype; `frozen`: no gradient to its tensors."""
        own = {
            name: parameter.detach() if frozen else parameter
            for name, parameter in self._parameters.items()
            if parameter is not None
        }
        hidden = h.to(self.down.dtype)
        if "norm" in own:
            hidden = F.layer_norm(hidden, hidden.shape[-1:], own["norm"], own["norm_bias"])
        hidden = ACTIVATIONS[self.activation](F.linear(hidden, own["down"], own["down_bias"]))
        return F.linear(hidden, own["up"], own["up_bias"]) * self.scale

    def onto(self, y: Tensor, x: Tensor, base: View) -> Tensor:
        return y + self.update(x if self.parallel else y).to(y.dtype)

    def extra_repr(self) -> str:
        """The line `print(model)` shows for this delta."""
        return f"size={self.size}, activation={self.activation}, scale={self.scale:g}"


def stream_width(view: View) -> int:
    """D: how wide a module's output is, for one that reads and writes the residual stream.

    A matrix tells it by its rows. Any other module by what the first layer in it takes.
    Errors: `UnsupportedModule` where no layer is found.
    """
    if isinstance(view, DenseView):
        return view.shape[0]
    for module in view.module.modules():
        inner = view_of(module)
        if inner is not None and inner.kind in ("linear", "conv1d_transposed"):
            return inner.shape[1]
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() > 1:  # a router of experts is no linear layer
            return weight.shape[-1]
    raise UnsupportedModule(
        "no layer in the module says how wide the residual stream is",
        found=type(view.module).__name__,
        expected="a module with a linear layer or a router that reads the stream",
    )


def device_of(view: View) -> torch.device:
    """Where a module's parameters are."""
    return next(view.module.parameters()).device
