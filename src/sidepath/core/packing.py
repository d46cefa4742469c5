"""What one number of a tensor packed into 4 bits was, as far as its code and scale tell.

See `core/quant.py` for the packing. Dimensions: O out, I in, N sampled numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
