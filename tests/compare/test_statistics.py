"""Intervals and tests, held against tables, hand computations and a numerical integral."""

from __future__ import annotations

import math

import pytest

from sidepath.compare.statistics import difference, holm, interval, t_quantile, within_t


def integrated(t: float, freedom: int, pieces: int = 4000) -> float:
    """P(|T| <= t) by Simpson's rule over the density: slow and obvious."""
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2)
    scale /= math.sqrt(freedom * math.pi)
    step = t / pieces
    total = 0.0
    for at in range(pieces + 1):
        weight = 1 if at in (0, pieces) else 4 if at % 2 else 2
        total += weight * (1 + (at * step) ** 2 / freedom) ** (-(freedom + 1) / 2)
    return 2 * scale * total * step / 3


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 9, 29])
@pytest.mark.parametrize("t", [0.3, 1.0, 2.5, 9.0])
def test_the_distribution_is_the_densitys_integral(freedom: int, t: float) -> None:
    assert within_t(t, freedom) == pytest.approx(integrated(t, freedom), abs=1e-8)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227)],
)
def test_the_quantiles_of_printed_tables(freedom: int, quantile: float) -> None:
    assert t_quantile(0.95, freedom) == pytest.approx(quantile, rel=2e-6)


def test_an_interval_by_hand() -> None:
    # mean 2.5, s^2 = 5/3, half width 3.182446 * sqrt(5/3) / 2 = 2.054260
    found = interval([1.0, 2.0, 3.0, 4.0])
    assert (found.mean, found.low, found.high) == pytest.approx((2.5, 0.445740, 4.554260), abs=1e-5)
    alone = interval([7.0])
    assert (alone.mean, alone.low, alone.high) == (7.0, None, None)


def test_paired_tests_by_hand() -> None:
    # differences 1, 2, 3: t = 2 / (1 / sqrt(3)); with 2 degrees P(|T| <= t) = t / sqrt(2 + t^2)
    found = difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    t = 2 * math.sqrt(3)
    assert found.mean == 2.0
    assert found.p_t == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert found.p_flip == found.least_p_flip == 0.25  # all signs alike: 2 of 8 patterns
    # 1, -1, 2, 2 sum to 4; of 16 patterns 6 reach as far: with the first plus, 4, 4 and 6.
    mixed = difference([1.0, -1.0, 2.0, 2.0], [0.0] * 4)
    assert mixed.p_flip == pytest.approx(6 / 16)


def test_what_says_nothing_is_not_given_a_p() -> None:
    same = difference([0.5, 0.6], [0.5, 0.6])
    assert (same.mean, same.p_t, same.p_flip) == (0.0, None, 1.0)
    assert difference([0.7, 0.8], [0.5, 0.6]).p_t is None, "no spread but for rounding"
    one = difference([1.0], [0.0])
    assert (one.p_t, one.p_flip, one.pairs) == (None, 1.0, 1)
    with pytest.raises(ValueError, match="longer"):
        difference([1.0], [1.0, 2.0])


def test_many_pairs_are_drawn_and_near_the_exact_test() -> None:
    one = [0.1 * at % 0.7 - 0.2 for at in range(18)]
    found = difference(one, [0.0] * 18)
    assert found == difference(one, [0.0] * 18), "the draws are the same each time"
    assert found.p_flip == pytest.approx(difference(one, [0.0] * 18).p_t or 0, abs=0.05)


def test_holms_adjustment_by_hand() -> None:
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
