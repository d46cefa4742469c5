"""What files from outside hold, checked: scales, and the two factors of an update (floor 5)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from sidepath.methods.lora import MAX_ALPHA, MAX_RANK
from sidepath.store.peft_config import positive


def scale_from(value: Any) -> float:
    """A scale or an alpha; none of ours is larger than is taken. Errors: `ValueError`."""
    return positive(value, MAX_ALPHA * MAX_RANK)


def scaling_from(alpha: Tensor, r: int) -> float:
    """`alpha / r`, of a tensor that holds alpha. Errors: `ValueError`."""
    if alpha.numel() != 1:
        raise ValueError(f"alpha of shape {list(alpha.shape)}, expected one number")
    return scale_from(float(alpha)) / r


def names_of(keys: Iterable[str], endings: Sequence[str]) -> list[str]:
    """What stands before one of the endings, each once, in the keys' order by ending."""
    keys = list(keys)
    return list(
        dict.fromkeys(key.removesuffix(end) for end in endings for key in keys if key.endswith(end))
    )


def both_factors(A: Tensor | None, B: Tensor | None, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """`A (R, I)` and `B (O, R)`, which a file holds under such names. Errors: `ValueError`."""
    if A is None or B is None:
        raise ValueError(f"{names[0]} or {names[1]} is missing")
    if A.dim() != 2 or B.dim() != 2 or len(A) != B.shape[1] or 0 in (*A.shape, *B.shape):
        raise ValueError(
            f"{names[0]} {list(A.shape)} and {names[1]} {list(B.shape)} are no two factors"
        )
    return A, B
