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

    A number lies between the midpoints to the neighbouring levels (or the bounds of them all),
    times its block's scale; a quantised scale lies between such midpoints itself; and
    the number was rounded to the dtype it was quantised from.
    """
    at = torch.tensor(list(positions), dtype=torch.long)
    pairs = take("weight", (at // 2).tolist()).long()
    codes = torch.where(at % 2 == 0, pairs >> 4, pairs & 15)
    levels = take("quant_map", range(16)).double()
    level, below, above = _neighbours(levels, codes, 0.5)
    scale, least, most = _scales(packing, take, (at // packing.blocksize).tolist())
    bounds = torch.stack([below * least, below * most, above * least, above * most])
    step = torch.finfo(packing.dtype).eps * bounds.abs().amax(0) / 2 + scale.abs() * 2.0**-16
    return torch.stack([level * scale, bounds.amin(0) - step, bounds.amax(0) + step], dim=1)


def _scales(packing: Packing, take: Take, blocks: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Each block's scale, and the least and greatest it could have been."""
    found = take("absmax", blocks)
    if not packing.nested_blocksize:
        scale = found.double()
        return scale, scale, scale
    levels = take("nested_quant_map", range(256)).double()
    own = take("nested_absmax", [block // packing.nested_blocksize for block in blocks]).double()
    # bitsandbytes' 8-bit codes are the nearest but for a few that are the nearest but one.
    level, below, above = _neighbours(levels, found.long(), 0.6)
    scale, least, most = (part * own + packing.offset for part in (level, below, above))
    return scale, least.clamp(min=0), most


def _neighbours(levels: Tensor, codes: Tensor, reach: float) -> tuple[Tensor, Tensor, Tensor]:
    """The level of each code, and how far down and up numbers were given it: `reach` of the way
    to the next level, and to -1 and 1, the bounds of what is quantised, from the outermost ones.
    """
    ordered = torch.unique(levels)
    level = levels[codes]
    place = torch.searchsorted(ordered, level)
    lower, upper = (ordered[(place + step).clamp(0, len(ordered) - 1)] for step in (-1, 1))
    below = level + reach * (lower - level)
    above = level + reach * (upper - level)
    return (
        level,
        torch.where(place == 0, -1.0, below),
        torch.where(place == len(ordered) - 1, 1.0, above),
    )
