from __future__ import annotations

import random

from sidepath.data.faults import KEPT, Faults, lines_of


def test_the_first_by_line_are_kept_in_whatever_order_they_come() -> None:
    faults = Faults()
    lines = list(range(1, 1001))
    random.Random(0).shuffle(lines)
    for line in lines:
        faults.add(line, "x")
        assert len(faults._kept) <= 4 * KEPT
    assert [line for line, _ in faults.kept] == list(range(1, KEPT + 1))
    assert faults.count == 1000
    assert faults.full


def test_faults_of_one_line_stay_in_order() -> None:
    faults = Faults()
    for line, text in ((2, "c"), (1, "a"), (1, "b")):
        faults.add(line, text)
    assert lines_of([("row", faults)]) == ["row 1: a", "row 1: b", "row 2: c"]
    assert not faults.full


def test_no_more_lines_than_an_error_shows() -> None:
    one, other = Faults(), Faults()
    for line in range(1, KEPT + 1):
        one.add(line, "x")
    assert len(lines_of([("a", one)])) == KEPT
    other.add(1, "y")
    shown = lines_of([("a", one), ("b", other)])
    assert shown[-2:] == [f"a {KEPT - 1}: x", "and 2 more faults"]
    one.merge(other)
    assert one.count == KEPT + 1
    assert [text for _, text in one.kept[:2]] == ["x", "y"]
    assert lines_of([]) == []
