"""Means, intervals and paired tests over a handful of seeds, in closed form.

Student's t with n degrees of freedom has a distribution in elementary functions (Abramowitz and
Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4), so no library is needed.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95
"""Of intervals; differences are held against its complement."""
ALL_FLIPS = 16
"""Up to so many pairs every pattern of signs is tried; beyond, so many patterns are drawn:"""
DRAWN = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval; the bounds are None for a single value."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference:
    """Paired differences `one - other`, seed by seed."""

    mean: float
    low: float | None
    high: float | None
    p_t: float | None
    """Two-sided p of the paired t-test; None where it says nothing: one pair, or no spread."""
    p_flip: float
    """Two-sided p of the sign-flip permutation test (exact for few pairs)."""
    least_p_flip: float
    """The smallest p that so many pairs can give."""
    pairs: int


def within_t(t: float, freedom: int) -> float:
    """P(|T| <= t) of Student's T with `freedom` >= 1 degrees of freedom."""
    angle = math.atan(abs(t) / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 or not odd else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def t_quantile(share: float, freedom: int) -> float:
    """The t with P(|T| <= t) = share, by bisection."""
    low, high = 0.0, 1.0
    while within_t(high, freedom) < share:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if within_t(middle, freedom) < share else (low, middle)
    return high


def interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """`mean ± t s / sqrt(n)`: the interval that Student's t gives for the mean of `values`."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None, None)
    freedom = len(values) - 1
    half = t_quantile(level, freedom) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def difference(one: Sequence[float], other: Sequence[float]) -> Difference:
    """`one - other`, pair by pair, with both tests. Raises ValueError for unequal lengths."""
    found = [a - b for a, b in zip(one, other, strict=True)]
    around = interval(found)
    count = len(found)
    return Difference(
        around.mean,
        around.low,
        around.high,
        _paired_t(found),
        _sign_flip(found),
        2.0 ** (1 - count),
        count,
    )


def _paired_t(found: Sequence[float]) -> float | None:
    spread = statistics.stdev(found) if len(found) > 1 else 0.0
    if spread <= 1e-12 * max(map(abs, found)):  # rounding alone
        return None
    t = statistics.fmean(found) / (spread / math.sqrt(len(found)))
    return max(0.0, 1 - within_t(t, len(found) - 1))


def _sign_flip(found: Sequence[float]) -> float:
    """Share of sign patterns whose sum is at least as far from zero as the one found."""
    reached = abs(math.fsum(found)) * (1 - 1e-9)
    count = len(found)
    if count <= ALL_FLIPS:
        # Turning every sign gives the same distance: half of the patterns are enough.
        patterns = itertools.product((1.0,), *[(1.0, -1.0)] * (count - 1))
        sums = [_flipped(found, signs) for signs in patterns]
        return sum(one >= reached for one in sums) / len(sums)
    from random import Random

    rng = Random(0)
    hits = sum(
        _flipped(found, [rng.choice((1.0, -1.0)) for _ in found]) >= reached for _ in range(DRAWN)
    )
    return (hits + 1) / (DRAWN + 1)


def _flipped(found: Sequence[float], signs: Sequence[float]) -> float:
    return abs(math.fsum(a * sign for a, sign in zip(found, signs, strict=True)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Each p, adjusted for the number of comparisons made (Holm, 1979); None stays None."""
    known = sorted((p, at) for at, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    worst = 0.0
    for rank, (p, at) in enumerate(known):
        worst = max(worst, min(1.0, p * (len(known) - rank)))
        adjusted[at] = worst
    return adjusted
