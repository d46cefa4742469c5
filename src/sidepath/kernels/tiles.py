"""Tokens sorted by slot and cut into tiles of one slot each: how a grouped kernel finds its work.

Dimensions: N tokens, S sum of ranks, K adapters, T tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sidepath.errors import RoutingError
from sidepath.kernels.triton_load import power_of_two


@dataclass(frozen=True)
class Tiles:
    """Tokens by slot, cut into tiles: made once for a batch, and read by every layer whose adapters
    have the same ranks and scalings.
    """

    order_N: Tensor
    """int32: the tokens by slot, the base's first, in their own order within a slot."""
    tiles_T4: Tensor
    """int32: first place in the order, tokens, first row of the stack, rank. None is the base's."""
    scalings_T: Tensor
    """float32."""
    block: int
    """Tokens of a tile, at most."""
    rank: int
    """The greatest rank."""
    stacked: int
    """S."""


def tiles_of(
    slot_N: Tensor,
    starts: Sequence[int],
    scalings: Sequence[float],
    device: torch.device,
    *,
    block: int | None = None,
) -> Tiles:
    """The tiles of a batch, on `device`. Slot k has the rows [starts[k], starts[k + 1]); -1 is the
    base. `block` is the greatest number of tokens of a tile, a power of two from 16.

    Slots are read on the host: give them there, or pay for waiting until the device has them.
    Errors: `RoutingError` with every slot that is none, and starts that do not fit or ascend.
    """
    slots_N = slot_N.detach().to("cpu", torch.int64)
    _check_slots(slots_N, starts, scalings)
    kinds = len(scalings)
    counts = torch.bincount(slots_N + 1, minlength=kinds + 1).tolist()
    ranks = [stop - start for start, stop in pairwise(starts)]
    groups = [slot for slot in range(kinds) if counts[slot + 1] and ranks[slot]]
    if block is None:
        mean = sum(counts[slot + 1] for slot in groups) // max(1, len(groups))
        block = power_of_two(mean, 16, 64)
    tiles, scales, first = [], [], counts[0]
    for slot in range(kinds):
        stop = first + counts[slot + 1]
        for place in range(first, stop, block) if ranks[slot] else ():
            tiles.append((place, min(block, stop - place), starts[slot], ranks[slot]))
            scales.append(scalings[slot])
        first = stop
    return Tiles(
        torch.argsort(slots_N, stable=True).to(torch.int32).to(device),
        torch.tensor(tiles, dtype=torch.int32).reshape(-1, 4).to(device),
        torch.tensor(scales, dtype=torch.float32).to(device),
        block,
        max((ranks[slot] for slot in groups), default=0),
        starts[-1],
    )


def _check_slots(slots_N: Tensor, starts: Sequence[int], scalings: Sequence[float]) -> None:
    faults = []
    if slots_N.dim() != 1:
        faults.append(f"slots of shape {tuple(slots_N.shape)}: expected one a token")
    if len(starts) != len(scalings) + 1:
        faults.append(f"{len(starts)} starts for {len(scalings)} scalings: expected one more")
    if not starts or starts[0] != 0 or any(a > b for a, b in pairwise(starts)):
        faults.append(f"starts {tuple(starts)}: expected to ascend from 0")
    strange = torch.unique(slots_N[(slots_N < -1) | (slots_N >= len(scalings))]).tolist()
    faults += [f"slot {slot}: expected -1 to {len(scalings) - 1}" for slot in strange]
    if faults:
        raise RoutingError("a routed product cannot be laid out", faults=faults)
