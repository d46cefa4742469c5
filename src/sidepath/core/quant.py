"""A layer whose weight is packed into 4-bit codes by bitsandbytes (NF4, FP4).

Block k of 64 numbers of the flattened weight keeps one scale `c_k = max |w|`, and each number w
the code of the level nearest to `w / c_k`; dequantised it is `level * c_k` (Dettmers et al.,
2023, section 3). With double quantisation the scales are 8-bit codes in blocks of 256 too.

bitsandbytes is an optional dependency: it is imported when something has to be packed. Its
layers change themselves in a forward pass (see `hold_still`, `base_product`); here they do not.

Dimensions: `...` any leading, O out, I in.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidepath.errors import MissingExtra, UnsupportedModule
from sidepath.kernels import on_gpu

LINEAR = "bitsandbytes.nn.modules.Linear4bit"
"""Qualified name of the layer that this module reads and makes."""
TRANSPOSED = "transformers.pytorch_utils.Conv1D"
BLOCK = 64
"""Numbers under one scale."""
_HELD = "_sidepath_held"


def require_bitsandbytes() -> Any:
    """The library, imported. Errors: `MissingExtra` with the install line."""
    # Layers ask in every pass, and a change of a logger's level clears the caches of all loggers.
    loaded = sys.modules.get("bitsandbytes")
    if loaded is not None:
        return loaded
    # It would advise a kernel for the repacking that `hold_still` keeps off.
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError as error:
        raise MissingExtra(
            "a 4-bit base needs bitsandbytes, which is not installed",
            hint="pip install 'sidepath[quant]'",
        ) from error
    finally:
        log.setLevel(level)
    return bitsandbytes


def qualified(cls: type) -> str:
    """`module.Class`, the name that tables of classes use."""
    return f"{cls.__module__}.{cls.__qualname__}"


def is_packed(module: nn.Module) -> bool:
    """Whether a module is a 4-bit linear layer (its weight may be unpacked while merged)."""
    cls = type(module)
    if cls not in _packed:
        _packed[cls] = any(qualified(one) == LINEAR for one in cls.__mro__)
    return _packed[cls]


_packed: dict[type[nn.Module], bool] = {}
"""By class: a model has many modules of few classes."""


def state_of(weight: Tensor) -> Any:
    """The library's record of how a parameter is packed, or None for any other tensor."""
    return getattr(weight, "quant_state", None)


def can_pack(module: nn.Module) -> bool:
    """Whether `packed_linear` can stand in for a module: of exactly the classes it names."""
    return type(module) is nn.Linear or qualified(type(module)) == TRANSPOSED


def compute_dtype(module: Any) -> torch.dtype:
    """The dtype a packed layer multiplies in: the one it was given, else the one it was
    quantised from.
    """
    if module.compute_dtype is not None:
        dtype: torch.dtype = module.compute_dtype
        return dtype
    state = state_of(module.weight) or module.quant_state
    return module.weight.dtype if state is None else state.dtype  # type: ignore[no-any-return]


def stored_transposed(module: nn.Module) -> bool:
    """Whether the base's folder stores this matrix as (I, O): it was a `Conv1D` of GPT-2."""
    source = module.__dict__.get("source_cls")
    return source is not None and any(qualified(cls) == TRANSPOSED for cls in source.__mro__)


def dequantised(module: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """The (O, I) matrix that a packed layer stands for, `level * scale` rounded once to `dtype`."""
    _unmingle(module)
    state = state_of(module.weight) or module.quant_state
    if state is None:
        raise UnsupportedModule(
            "a 4-bit layer has not been packed yet",
            hint='move it to its device first: module.to("cpu") or .to("cuda")',
        )
    return _dequantised(module.weight.data, state, dtype)


def _dequantised(codes: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    bnb = require_bitsandbytes().functional
    scales = state.absmax
    if state.nested:
        scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    shape = tuple(state.shape)
    flat = math.prod(shape)
    # The CPU kernel of bitsandbytes 0.50 gives a row that begins inside a block the scales of
    # other blocks, so it is shown rows that begin where blocks do.
    rows = flat // state.blocksize if flat % state.blocksize == 0 else 1
    seen = shape if shape[-1] % state.blocksize == 0 else (rows, flat // rows)
    result: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        codes.reshape(-1, 1), scales.float(), state.blocksize, state.quant_type, seen, dtype
    )
    return result.reshape(shape)


class _Product(torch.autograd.Function):
    """`W x + b` of a packed layer; `W` is dequantised in each pass and never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, module: nn.Module) -> Tensor:
        ctx.module = module
        return F.linear(x, dequantised(module, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        (gradient_O,) = gradients
        return gradient_O @ dequantised(ctx.module, gradient_O.dtype), None, None


def product(module: Any, x: Tensor) -> Tensor:
    """`W x + b` in the layer's compute dtype, in `x`'s dtype; gradients reach `x` alone.

    What bitsandbytes' forward pass gives, without its kernel for the whole product.
    """
    dtype = compute_dtype(module)
    bias = None if module.bias is None else module.bias.detach().to(dtype)
    result: Tensor = _Product.apply(x.to(dtype), bias, module)  # type: ignore[no-untyped-call]
    return result.to(x.dtype)


def misread(module: Any) -> bool:
    """Whether bitsandbytes' own forward pass would compute with wrong scales (see `hold_still`)."""
    weight, state = module.weight, state_of(module.weight) or module.quant_state
    if state is None or weight.device.type != "cpu":
        return False
    return bool(state.shape[-1] % state.blocksize)


def nearest_levels(
    W_OI: Tensor, *, quant_type: str = "nf4", blocksize: int = BLOCK, double: bool = True
) -> Tensor:
    """`W` quantised and back again, in float32: what a 4-bit layer made of it would compute with.

    `W` is in float32, bfloat16 or float16, and is quantised from that dtype.
    """
    bnb = require_bitsandbytes().functional
    codes, state = bnb.quantize_4bit(
        W_OI.contiguous(), blocksize=blocksize, quant_type=quant_type, compress_statistics=double
    )
    return _dequantised(codes, state, torch.float32)


def packed_linear(
    module: nn.Module, *, dtype: torch.dtype = torch.bfloat16, double: bool = True
) -> nn.Module:
    """A 4-bit layer in the place of a linear one (`nn.Linear` or transformers' `Conv1D`).

    The weight is quantised to NF4 in blocks of 64 from the dtype it has; `double` quantises the
    scales as well. The bias is kept, in `dtype`, which is also what the layer computes in.
    The given module is not changed. The inverse is `plain_linear`.
    """
    bnb = require_bitsandbytes()
    weight = module.weight
    assert isinstance(weight, Tensor)
    turned = qualified(type(module)) == TRANSPOSED
    W_OI = weight.detach().T if turned else weight.detach()
    rows, columns = W_OI.shape
    bias = module._parameters.get("bias")
    settings = {"compress_statistics": double, "quant_type": "nf4"}
    with torch.device("meta"):
        made: nn.Module = bnb.nn.Linear4bit(
            columns, rows, bias is not None, compute_dtype=dtype, **settings
        )
    codes = bnb.nn.Params4bit(W_OI.contiguous(), requires_grad=False, module=made, **settings)
    made._parameters["weight"] = codes.to(weight.device)
    if bias is not None:
        made._parameters["bias"] = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    made.__dict__["source_cls"] = type(module)  # as transformers notes it
    hold_still([made])
    return made.train(module.training)


def plain_linear(module: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The plain layer of the class a packed one was made from, its weight dequantised to `dtype`.

    The bias keeps its dtype; the given module is not changed. The inverse of `packed_linear`, but
    for what quantising lost.
    """
    W_OI = dequantised(module, dtype)
    source = module.__dict__.get("source_cls") or nn.Linear
    with torch.device("meta"):
        if stored_transposed(module):
            made, W_OI = source(module.out_features, module.in_features), W_OI.T.contiguous()
        else:
            made = nn.Linear(module.in_features, module.out_features, module.bias is not None)
    made._parameters["weight"] = nn.Parameter(W_OI, requires_grad=False)
    if module.bias is not None:
        made._parameters["bias"] = nn.Parameter(module.bias.detach(), requires_grad=False)
    return made.train(module.training)


def base_product(x: Tensor, module: Any, forward: Callable[[Tensor], Tensor]) -> Tensor:
    """A packed layer's own output `W x + b`; `forward` is its forward pass. Changes nothing.

    bitsandbytes casts the bias in place to the compute dtype: it is put back. A layer that an
    adapter is merged into holds a plain weight, which `forward` could not read.
    """
    bias = module.bias
    if module.weight.is_floating_point():
        weight = module.weight
        own = None if bias is None else bias.to(weight.dtype)
        return F.linear(x.to(weight.dtype), weight, own).to(x.dtype)
    state = state_of(module.weight)
    if (
        bias is None
        and state is not None
        and on_gpu.may_run(x)
        and x.dtype == compute_dtype(module)
    ):
        return on_gpu.packed_product(x, module.weight.data, state, lambda: forward(x))
    held = None if bias is None else bias.data
    y = forward(x)
    if held is not None and bias.dtype != held.dtype:
        bias.data = held
    return y


def hold_still(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Let packed layers compute with the numbers they hold, and leave those alone; returns the
    layers that were changed for that. Two ways of bitsandbytes 0.50 on CPUs are kept off:

    - With AVX512-BF16 it repacks a layer on the first forward pass in eval mode: its codes move,
      its scales are rounded to bfloat16, and from then on `dequantize_4bit`, and so the gradient,
      reads other numbers.
    - With AVX512 it takes wrong scales where a row does not begin a block (`in_features` is no
      multiple of 64): outputs are off by more than half their size. Such layers get a forward
      pass of their own, `product`.

    In place; the inverse is `let_go`.
    """
    changed = []
    for module in modules:
        if not is_packed(module) or vars(module).get(_HELD):
            continue
        _unmingle(module)
        repacks = vars(module).get("support_avx512bf16_for_cpu", False)
        module.__dict__[_HELD] = (repacks, shadowed := misread(module))
        module.__dict__["support_avx512bf16_for_cpu"] = False
        if shadowed:
            module.__dict__["forward"] = partial(product, module)
        changed.append(module)
    return changed


def let_go(modules: Iterable[nn.Module]) -> None:
    """Give back what `hold_still` changed. In place."""
    for module in modules:
        repacks, shadowed = module.__dict__.pop(_HELD)
        module.__dict__["support_avx512bf16_for_cpu"] = repacks
        if shadowed:
            module.__dict__.pop("forward", None)


def _unmingle(module: nn.Module) -> None:
    """Undo bitsandbytes' repacking for the processor; making a state dict does so, in place."""
    state = state_of(module.weight)  # type: ignore[arg-type]
    if getattr(state, "packing_format_for_cpu", False):
        module.state_dict()
