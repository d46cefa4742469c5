"""What stands at one place of the base: any module, or one that holds a matrix `W0`.

A view is made before a module is adapted and keeps the way to call it as it was. A dense
view adds the one picture all dense layers share: an (O, I) matrix, whatever the layout.

Dimensions: `...` any leading, O out, I in (embedding: the vocabulary; convolution: the
input channels of a group times the kernel), R rank, G groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidepath.core import quant
from sidepath.kernels.linear import Layer
from sidepath.kernels.lowrank import low_rank

Kind = Literal["linear", "conv1d_transposed", "embedding", "conv"]


class View:
    """One module of the base, callable as it was before anything stood beside it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.base_class = type(module)
        # Dispatchers (accelerate's device maps) shadow `forward` on the instance: keep theirs.
        self.own_forward: Callable[..., Tensor] | None = module.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base module's output, side paths left out."""
        if self.own_forward is not None:
            return self.own_forward(*args, **kwargs)
        result: Tensor = self.base_class.forward(self.module, *args, **kwargs)
        return result


class DenseView(View, ABC):
    """A module that holds one matrix `W0 (O, I)`."""

    kind: ClassVar[Kind]

    @property
    def weight(self) -> Tensor:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the layer computes in."""
        return self.weight.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of the matrix."""
        rows, columns = self.matrix().shape
        return rows, columns

    def matrix(self) -> Tensor:
        """`W0` as (O, I), sharing the parameter's storage where the layout allows."""
        return self.as_matrix(self.weight)

    @abstractmethod
    def as_matrix(self, weight: Tensor) -> Tensor:
        """A tensor in the layout of the module's own parameter as (O, I); a view if contiguous."""

    @abstractmethod
    def from_matrix(self, W_OI: Tensor) -> Tensor:
        """An (O, I) matrix in the layout of the module's own parameter.

        It is an `nn.Parameter` where the module's own could not hold it: then it takes that one's
        place while merged, and the own one comes back when unmerged.
        """

    @abstractmethod
    def product(self, x: Tensor, A_RI: Tensor, B_OR: Tensor) -> Tensor:
        """`B (A x)` in the module's own terms; the result broadcasts with its output."""


class LinearView(DenseView):
    """`nn.Linear`: the weight is (O, I) already."""

    kind: ClassVar[Kind] = "linear"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.as_known = _as_known(self.base_class)
        """Whether the module computes what the class in the table does, and not something more."""

    def layer(
        self, A_RI: Tensor | None = None, B_OR: Tensor | None = None, scaling: float = 1.0
    ) -> Layer | None:
        """The layer with a side path, for kernels that give its weights no gradient; None where
        they have one, or where the layer is not called as its class says.
        """
        parameters = self.module._parameters
        # A parametrised weight is no parameter of its module.
        if self.own_forward is not None or "weight" not in parameters or not self.as_known:
            return None
        for parameter in parameters.values():
            if parameter is not None and parameter.requires_grad:
                return None
        weight = parameters["weight"]
        if weight is not None and self.kind != "linear":
            weight = weight.T  # type: ignore[assignment]
        return Layer(self, weight, parameters.get("bias"), A_RI, B_OR, scaling)

    def matrix_as(self, dtype: torch.dtype) -> Tensor:
        """`W0` in another dtype; itself where it has that one."""
        return self.matrix().to(dtype)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight

    def from_matrix(self, W_OI: Tensor) -> Tensor:
        return W_OI.contiguous()

    def product(self, x: Tensor, A_RI: Tensor, B_OR: Tensor) -> Tensor:
        return low_rank(x, A_RI, B_OR)


class _InputsFirst(DenseView, ABC):
    """A weight that is stored (I, O)."""

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def from_matrix(self, W_OI: Tensor) -> Tensor:
        return W_OI.T.contiguous()


class TransposedView(_InputsFirst, LinearView):
    """transformers' `Conv1D` (GPT-2): a linear layer whose weight is stored (I, O)."""

    kind: ClassVar[Kind] = "conv1d_transposed"


class EmbeddingView(_InputsFirst):
    """`nn.Embedding`: the input is a one-hot of the vocabulary, the weight is stored (I, O)."""

    kind: ClassVar[Kind] = "embedding"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        # Gemma multiplies its embeddings' output; a delta of the weight is multiplied alike.
        self.output_scale = float(getattr(module, "scalar_embed_scale", 1.0))
        self.padding_idx: int | None = getattr(module, "padding_idx", None)

    def product(self, x: Tensor, A_RI: Tensor, B_OR: Tensor) -> Tensor:
        hidden_R = F.embedding(x, A_RI.T, padding_idx=self.padding_idx)
        return F.linear(hidden_R, B_OR) * self.output_scale


class ConvView(DenseView):
    """`nn.Conv1d/2d/3d`: kernels flattened to rows of (I / G · kernel) numbers.

    With G groups the same `A` looks at each group's channels and `B`'s rows belong to their
    own group, so that `ΔW = B A` holds for the flattened matrix, grouped or not.
    """

    kind: ClassVar[Kind] = "conv"

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(weight.shape[0], -1)

    def from_matrix(self, W_OI: Tensor) -> Tensor:
        return W_OI.reshape(self.weight.shape).contiguous()

    def product(self, x: Tensor, A_RI: Tensor, B_OR: Tensor) -> Tensor:
        groups = int(self.module.groups)  # type: ignore[arg-type]
        kernel = self.weight.shape[1:]
        point = (1,) * (len(kernel) - 1)
        down = A_RI.reshape(-1, *kernel).repeat(groups, *(1,) * len(kernel))
        # The module's own call knows its stride, dilation, groups and padding mode.
        hidden = self.module._conv_forward(x.to(A_RI.dtype), down, None)  # type: ignore[operator]
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(point) - 1]
        return convolve(hidden, B_OR.reshape(*B_OR.shape, *point), groups=groups)


class PackedView(LinearView):
    """bitsandbytes' `Linear4bit`: codes of 4 bits, a matrix only when it is asked for."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return quant.base_product(args[0], self.module, super().__call__)

    @property
    def dtype(self) -> torch.dtype:
        return quant.compute_dtype(self.module)

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.module.out_features), int(self.module.in_features)  # type: ignore[arg-type]

    def matrix(self) -> Tensor:
        """`W0` dequantised, in float32; made anew at each call."""
        return quant.dequantised(self.module)

    def layer(
        self, A_RI: Tensor | None = None, B_OR: Tensor | None = None, scaling: float = 1.0
    ) -> Layer | None:
        if self.weight.is_floating_point() or not self.as_known:
            return None  # an adapter is merged into it, or its class has a way of its own
        return Layer(self, None, None, A_RI, B_OR, scaling)

    def matrix_as(self, dtype: torch.dtype) -> Tensor:
        return quant.dequantised(self.module, dtype)

    def from_matrix(self, W_OI: Tensor) -> Tensor:
        plain = W_OI.to(self.dtype).contiguous()
        return nn.Parameter(plain, requires_grad=False)


VIEWS: dict[str, type[DenseView]] = {
    quant.LINEAR: PackedView,
    "torch.nn.modules.linear.Linear": LinearView,
    "transformers.pytorch_utils.Conv1D": TransposedView,
    "torch.nn.modules.sparse.Embedding": EmbeddingView,
    "torch.nn.modules.conv.Conv1d": ConvView,
    "torch.nn.modules.conv.Conv2d": ConvView,
    "torch.nn.modules.conv.Conv3d": ConvView,
}
"""By qualified name, so that this floor imports torch alone. Subclasses inherit their view."""

NEVER_CALLED = "torch.nn.modules.linear.NonDynamicallyQuantizableLinear"
"""`nn.MultiheadAttention` reads this layer's weight and never calls it: no side path can act."""


def view_of(module: nn.Module) -> DenseView | None:
    """The dense view of a module, or None where no side path can stand beside it."""
    view = _view_class(type(module))
    if view is None:
        return None
    usable = view is PackedView or _plain_weight(module)
    return view(module) if usable else None


_found: dict[type[nn.Module], type[DenseView] | None] = {}


def _view_class(cls: type[nn.Module]) -> type[DenseView] | None:
    """Kept by class: a model has many modules of few classes, and each is asked several times."""
    if cls not in _found:
        _found[cls] = _search(cls)
    return _found[cls]


def _search(cls: type[nn.Module]) -> type[DenseView] | None:
    for base in cls.__mro__:
        name = quant.qualified(base)
        if name == NEVER_CALLED:
            return None
        if name in VIEWS:
            return VIEWS[name]
    return None


_as_is: dict[type[nn.Module], bool] = {}


def _as_known(cls: type[nn.Module]) -> bool:
    if cls not in _as_is:
        known = next(base for base in cls.__mro__ if quant.qualified(base) in VIEWS)
        _as_is[cls] = getattr(cls, "forward") is getattr(known, "forward")  # noqa: B009 - mypy
    return _as_is[cls]


def _plain_weight(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return False
    # Looked up as Python would, but a module without it does not go through torch's own search.
    renormed = module.__dict__.get("max_norm", getattr(type(module), "max_norm", None))
    return renormed is None
