"""What is made of the measurements of one figure."""

from __future__ import annotations

import json

import pytest

from sidepath.bench.figure import Figure, at_least, at_most, figure_of
from sidepath.bench.timing import Spread


def test_ratios_targets_and_verdicts(figures: list[Figure]) -> None:
    step = figures[0]
    lines = {one.of: one for one in step.comparisons}
    assert list(lines) == ["ours / floor", "PEFT / ours", "PEFT / floor"]
    spread = lines["ours / floor"].spread
    assert (spread.median, spread.min, spread.max) == pytest.approx((1.0, 0.9, 1.1))
    assert lines["ours / floor"].reached is False
    assert lines["PEFT / ours"].spread.median == pytest.approx(1.5)
    assert lines["PEFT / ours"].reached is True
    assert lines["PEFT / floor"].reached is None
    assert step.ratio == lines["PEFT / ours"].spread


def test_a_value_of_one_way_has_a_target(figures: list[Figure]) -> None:
    (line,) = figures[2].comparisons
    assert (line.of, line.spread, line.reached) == ("ours", Spread(0.02, 0.01, 0.03), True)


@pytest.mark.parametrize(
    ("target", "text", "met", "missed"),
    [(at_most(0.95), "<= 0.95", 0.95, 0.951), (at_least(1.35), ">= 1.35", 1.35, 1.349)],
)
def test_targets(target: object, text: str, met: float, missed: float) -> None:
    assert str(target) == text
    assert target.met_by(met)  # type: ignore[attr-defined]
    assert not target.met_by(missed)  # type: ignore[attr-defined]


def test_the_document_has_the_shape_that_scripts_read(figures: list[Figure]) -> None:
    document = json.loads(json.dumps(figures[0].as_dict()))
    assert document["name"] == "step-x"
    assert (document["ours"], document["peer"]) == (2.0, 3.0)
    assert document["ratio"] == {
        "of": "PEFT / ours",
        "median": pytest.approx(1.5),
        "min": pytest.approx(1.5 / 1.1),
        "max": pytest.approx(1.5),
    }
    assert document["comparisons"][0] == {
        "of": "ours / floor",
        "median": 1.0,
        "min": pytest.approx(0.9),
        "max": pytest.approx(1.1),
        "target": "<= 0.95",
        "reached": False,
    }


def test_without_the_peer_its_columns_are_empty(figures: list[Figure]) -> None:
    document = figures[2].as_dict()
    assert document["peer"] is None
    assert document["ratio"] == {"of": "PEFT / ours", "median": None, "min": None, "max": None}


def test_a_target_against_a_way_that_was_not_measured_is_left_out() -> None:
    targets = {"ours / PEFT": at_most(0.27), "ours / floor": at_most(1.0)}
    found = figure_of("x", "x", {"ours": [1.0], "floor": [2.0]}, targets, reference="floor")
    assert [one.of for one in found.comparisons] == ["ours / floor"]
