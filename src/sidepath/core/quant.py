"""A layer whose weight is packed into 4-bit codes by bitsandbytes (NF4, FP4).

Block k of 64 numbers of the flattened weight keeps one scale `c_k = max |w|`, and each number w
the code of the level nearest to `w / c_k`; dequantised it is `level * c_k` (Dettmers et al.,
2023, section 3). With double quantisation the scales are 8-bit codes in blocks of 256 too.

bitsandbytes is an optional dependency: it is imported when something has to be packed. Its
layers change themselves in a forward pass (see `hold_still`, `base_product`); here they do not.

Dimensions: `...` any leading, O out, I in, N sampled numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidepath.errors import MissingExtra, UnsupportedModule

LINEAR = "bitsandbytes.nn.modules.Linear4bit"
"""Qualified name of the layer that this module reads and makes."""
TRANSPOSED = "transformers.pytorch_utils.Conv1D"
BLOCK = 64
"""Numbers under one scale."""


def require_bitsandbytes() -> Any:
    """The library, imported. Errors: `MissingExtra` with the install line."""
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
    return any(qualified(cls) == LINEAR for cls in type(module).__mro__)


def state_of(weight: Tensor) -> Any:
    """The library's record of how a parameter is packed, or None for any other tensor."""
    return getattr(weight, "quant_state", None)


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
    result: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        codes.reshape(-1, 1), scales.float(), state.blocksize, state.quant_type, shape, dtype
    )
    return result


def round_trip(module: Any, W_OI: Tensor) -> Tensor:
    """`W` quantised as this layer's own weight is, and back again; float32, nothing changes."""
    weight = module.weight
    return nearest_levels(
        W_OI.to((state_of(weight) or module.quant_state).dtype),
        quant_type=weight.quant_type,
        blocksize=weight.blocksize,
        double=weight.compress_statistics,
    )


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
    source = next(cls for cls in type(module).__mro__ if qualified(cls) != LINEAR)
    W_OI = weight.detach().T if qualified(source) == TRANSPOSED else weight.detach()
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
    made.__dict__["source_cls"] = source
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
    held = None if bias is None else bias.data
    y = forward(x)
    if held is not None and bias.dtype != held.dtype:
        bias.data = held
    return y


def hold_still(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Keep packed layers from rewriting their weight in a forward pass; returns those changed.

    On processors with AVX512-BF16, bitsandbytes repacks a layer on the first forward pass in
    eval mode: its codes move, its scales are rounded to bfloat16, and from then on no gradient
    passes through it and `dequantize_4bit` gives other numbers. The inverse is `let_go`.
    """
    changed = []
    for module in modules:
        if is_packed(module) and vars(module).get("support_avx512bf16_for_cpu"):
            _unmingle(module)
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            changed.append(module)
    return changed


def let_go(modules: Iterable[nn.Module]) -> None:
    """Give back what `hold_still` changed. In place."""
    for module in modules:
        module.support_avx512bf16_for_cpu = True  # type: ignore[assignment]


def _unmingle(module: nn.Module) -> None:
    """Undo bitsandbytes' repacking for the processor; making a state dict does so, in place."""
    state = state_of(module.weight)  # type: ignore[arg-type]
    if getattr(state, "packing_format_for_cpu", False):
        module.state_dict()


@dataclass(frozen=True)
class Packing:
    """How one tensor is packed, wherever it lies: in memory or in a file."""

    quant_type: str
    dtype: torch.dtype
    """The dtype it was quantised from."""
    shape: tuple[int, ...]
    blocksize: int
    nested_blocksize: int
    """Scales under one scale of their own; 0 without double quantisation."""
    offset: float
    """Mean of the scales, taken off before they are quantised."""


Take = Callable[[str, Sequence[int]], Tensor]
"""Some numbers of one of a packed tensor's parts, by position. Parts have bitsandbytes' names:
`weight` (bytes of two codes), `absmax`, `quant_map`, `nested_absmax`, `nested_quant_map`."""


def intervals(packing: Packing, take: Take, positions: Sequence[int]) -> Tensor:
    """(N, 3) in float64: the dequantised number at each position of the flattened (O, I) matrix,
    and the least and the greatest number that could have been quantised to it.

    A number lies between the midpoints to the neighbouring levels (the outermost levels are its
    bounds), times its block's scale; a quantised scale lies between such midpoints itself; and
    the number was rounded to the dtype it was quantised from.
    """
    at = torch.tensor(list(positions), dtype=torch.long)
    pairs = take("weight", (at // 2).tolist()).long()
    codes = torch.where(at % 2 == 0, pairs >> 4, pairs & 15)
    levels = take("quant_map", range(16)).double()
    level, below, above = _neighbours(levels, codes)
    scale, least, most = _scales(packing, take, (at // packing.blocksize).tolist())
    bounds = torch.stack([below * least, below * most, above * least, above * most])
    step = torch.finfo(packing.dtype).eps * bounds.abs().amax(0) / 2 + scale.abs() * 2.0**-20
    return torch.stack([level * scale, bounds.amin(0) - step, bounds.amax(0) + step], dim=1)


def _scales(packing: Packing, take: Take, blocks: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Each block's scale, and the least and greatest it could have been."""
    found = take("absmax", blocks)
    if not packing.nested_blocksize:
        scale = found.double()
        return scale, scale, scale
    levels = take("nested_quant_map", range(256)).double()
    own = take("nested_absmax", [block // packing.nested_blocksize for block in blocks]).double()
    level, below, above = _neighbours(levels, found.long())
    scale, least, most = (part * own + packing.offset for part in (level, below, above))
    return scale, least.clamp(min=0), most


def _neighbours(levels: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The level of each code, and the midpoints to the next lower and higher level."""
    ordered = torch.unique(levels)
    level = levels[codes]
    place = torch.searchsorted(ordered, level)
    below = (level + ordered[(place - 1).clamp(min=0)]) / 2
    above = (level + ordered[(place + 1).clamp(max=len(ordered) - 1)]) / 2
    return level, below, above
