"""Numbers of files from outside (floor 5)."""

from __future__ import annotations

import math
from typing import Any

from sidepath.methods.lora import MAX_ALPHA, MAX_RANK

LARGEST = MAX_ALPHA * MAX_RANK
"""More than any scale or alpha that an adapter of ours can have."""


def positive(value: Any) -> float:
    """A finite number above 0. Errors: `ValueError`."""
    if type(value) not in (int, float) or not math.isfinite(value) or not 0 < value <= LARGEST:
        raise ValueError(f"{value!r}, expected a number above 0 and at most {LARGEST:g}")
    return float(value)


def rank(value: Any) -> int:
    """A rank. Errors: `ValueError`."""
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise ValueError(f"{value!r}, expected a whole number from 1 to {MAX_RANK}")
    return value
