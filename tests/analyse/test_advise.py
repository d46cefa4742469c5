"""Advice against trying everything."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sidepath.analyse import Factors
from sidepath.analyse.advise import advise, energy_of_kinds, kind_of, ranks_below
from sidepath.errors import ConfigError


@given(st.integers(1, 70), st.integers(1, 70), st.booleans())
def test_the_smallest_rank_that_keeps_the_metric(r: int, needed: int, higher: bool) -> None:
    sign = 1.0 if higher else -1.0
    calls = []

    def score(rank: int, kinds: object) -> float:
        calls.append(rank)
        return sign * (0.9 if rank >= needed else 0.5)

    found = advise(score, sign * 0.9, r, ("q",), tolerance=0.01, higher_is_better=higher)
    slow = [rank for rank in ranks_below(r) if rank >= needed]
    assert found.rank == (min(slow) if slow else r)
    assert len(calls) <= math.ceil(math.log2(len(ranks_below(r)) + 1))
    assert found.value == sign * 0.9
    assert found.kinds == ("q",), "one kind has to stay"


@given(st.sets(st.sampled_from("abcd")))
def test_kinds_that_do_nothing_are_left_out(useful: set[str]) -> None:
    kinds = tuple("abcd")

    def score(_: int, chosen: object) -> float:
        return float(len(useful & set(chosen)))  # type: ignore[call-overload]

    found = advise(score, float(len(useful)), 1, kinds, tolerance=0.0)
    enough = [
        set(some)
        for size in range(1, 5)
        for some in itertools.combinations(kinds, size)
        if useful <= set(some)
    ]
    assert len(found.kinds) == min(map(len, enough))
    assert useful <= set(found.kinds)
    assert found.as_dict()["targets"] == list(found.kinds)


def test_the_tolerance_is_in_the_metrics_own_unit() -> None:
    values = {1: 0.80, 2: 0.89, 4: 0.90}
    found = advise(lambda rank, _: values[rank], 0.90, 4, ("q",), tolerance=0.01)
    assert found.rank == 2
    assert found.worst == pytest.approx(0.89)
    assert [(one.rank, one.kept) for one in found.tried] == [(2, True), (1, False)]


@pytest.mark.parametrize(("tolerance", "full"), [(-0.1, 1.0), (math.nan, 1.0), (0.1, math.nan)])
def test_nonsense_is_refused(tolerance: float, full: float) -> None:
    with pytest.raises(ConfigError, match="no advice"):
        advise(lambda *_: 1.0, full, 4, ("q",), tolerance=tolerance)


def test_energy_is_shared_out_by_kind() -> None:
    one = Factors(torch.eye(1, 4), torch.eye(3, 1) * 3.0, 1.0)
    other = Factors(torch.eye(1, 4), torch.eye(3, 1), 1.0)
    found = energy_of_kinds({"layers.0.q": other, "layers.0.v": one, "layers.1.q": other})
    assert list(found) == ["v", "q"]
    assert found == pytest.approx({"v": 9 / 11, "q": 2 / 11})
    assert kind_of("head") == "head"
    nothing = Factors(torch.eye(1, 4), torch.zeros(3, 1), 1.0)
    assert energy_of_kinds({"a": nothing}) == {"a": 0.0}
