"""Where Triton's kernels take the place of the plain forms: on CUDA, once they agreed with them.

In Triton's interpreter the same code runs on a CPU.

Dimensions: B rows, T tokens a row, N = B T, I in, O out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sidepath.kernels import triton_nf4, triton_routed
from sidepath.kernels.checked import TRIALS, Key, Trials, eligible
from sidepath.kernels.routed import Stack
from sidepath.kernels.tiles import Tiles, tiles_of


def may_run(tensor: Tensor) -> bool:
    """Whether to ask for a kernel at all: no gradient is recorded, which they could not give."""
    return not torch.is_grad_enabled() and eligible(tensor)


def add_stack_(
    y_BTO: Tensor,
    x_BTI: Tensor,
    stack: Stack,
    slots: Sequence[int],
    kept: dict[object, Any],
    plain: Callable[[Tensor], None],
    trials: Trials = TRIALS,
) -> None:
    """Add each row's own update to `y`, in place: by Triton, or by `plain(y)` where it has not
    agreed with that or does not take these tensors. `kept` keeps the tiles of a batch's slots.
    """
    y_NO, x_NI = y_BTO.view(-1, y_BTO.shape[-1]), x_BTI.reshape(-1, x_BTI.shape[-1])
    if not triton_routed.supports(y_NO, x_NI, stack.A_SI, stack.B_SO):
        plain(y_BTO)
        return
    where = ("tiles", stack.starts, x_BTI.shape[1])
    if where not in kept:
        slot_N = torch.tensor(list(slots)).repeat_interleave(x_BTI.shape[1])
        ones = (1.0,) * (len(stack.starts) - 1)  # the scaling is in B already
        kept[where] = (slot_N, ones, tiles_of(slot_N, stack.starts, ones, y_NO.device))
    slot_N, ones, tiles = kept[where]
    assert isinstance(tiles, Tiles)

    def fast(y: Tensor) -> None:
        triton_routed.add_routed_(
            y.view(y_NO.shape),
            x_NI,
            stack.A_SI,
            stack.B_SO,
            stack.starts,
            ones,
            slot_N,
            tiles=tiles,
        )

    shapes = triton_routed.shape_class(y_NO, x_NI, tiles)
    trials.add_(Key("routed", (y_NO.dtype, stack.A_SI.dtype), shapes), y_BTO, fast, plain)


def packed_product(
    x: Tensor, codes: Tensor, state: Any, plain: Callable[[], Tensor], trials: Trials = TRIALS
) -> Tensor:
    """`x W^T` with a 4-bit matrix: by Triton where that agreed with `plain()` and was faster."""
    packed = triton_nf4.packed_of(codes, state)
    x_NI = x.reshape(-1, x.shape[-1])
    if not triton_nf4.supports(x_NI, packed):
        return plain()

    def fast() -> Tensor:
        return triton_nf4.product(x_NI, packed).view(*x.shape[:-1], -1)

    key = Key("nf4", (x.dtype,), triton_nf4.shape_class(x_NI, packed))
    return trials.run(key, fast, plain, timed=True)
