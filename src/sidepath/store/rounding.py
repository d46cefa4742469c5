"""Which real numbers a stored number stands for, and when two stand for one (floor 4)."""

from __future__ import annotations

import math

_PRECISION = {"F64": (52, -1022), "F32": (23, -126), "F16": (10, -14), "BF16": (7, -126)}
"""Bits of the mantissa and smallest exponent, by safetensors' name of a dtype."""
_LARGEST_F16 = 65504.0

Interval = tuple[float, float, float]
"""A number, and the least and the greatest that it may have been."""


def within(one: Interval, other: Interval) -> bool:
    """Whether each number lies within the other's interval: the same code of one packing."""
    return other[1] <= one[0] <= other[2] and one[1] <= other[0] <= one[2]


def meet(one: Interval, other: Interval) -> bool:
    """Whether one real number can be behind both."""
    return one[1] <= other[2] and other[1] <= one[2]


def overlap(a: float, dtype_a: str, b: float, dtype_b: str) -> bool:
    """Whether one real number rounds to `a` in one dtype and to `b` in the other."""
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    if a == b:
        return True
    if dtype_a == dtype_b:
        return False
    if math.isinf(a) or math.isinf(b):
        # float16 overflows where the other dtypes do not: its infinity stands for all beyond.
        finite = b if math.isinf(a) else a
        infinite, dtype = (a, dtype_a) if math.isinf(a) else (b, dtype_b)
        return (
            dtype == "F16"
            and math.copysign(finite, infinite) == finite
            and (abs(finite) > _LARGEST_F16)
        )
    return abs(a - b) <= (ulp(a, dtype_a) + ulp(b, dtype_b)) / 2


def ulp(value: float, dtype: str) -> float:
    """A unit in the last place of a number: the step to the next one of its dtype."""
    bits, smallest = _PRECISION[dtype]
    exponent = math.frexp(value)[1] - 1 if value else smallest
    return math.ldexp(1.0, max(exponent, smallest) - bits)
