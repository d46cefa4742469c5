from __future__ import annotations

import pytest

from sidepath.data.classes import LARGEST, Classes
from sidepath.data.sources import Row, Source
from sidepath.data.tables import Items
from sidepath.errors import DataError


def nothing() -> Items:
    yield from ()


def source() -> Source:
    return Source("a.csv", "line", nothing)


def rows(*labels: object) -> list[Row]:
    return [Row(line, {"label": label}) for line, label in enumerate(labels, start=1)]


def test_numbers_become_sorted_ids_over_all_chunks() -> None:
    classes, found = Classes(None), source()
    assert classes.numbers(found, rows("10", " 9 ")) == [0, 1]
    assert classes.numbers(found, rows(2, "10")) == [2, 0]
    assert classes.settle() == ([2, 1, 0], ("2", "9", "10"))


def test_names_before_positions() -> None:
    by_name, found = Classes(("1", "0")), source()
    by_name.numbers(found, rows("1", "0", "2"))
    assert by_name.settle() == ([0, 1, 0], ("1", "0"))
    assert found.faults.kept == [(3, 'label "2" is out of range: expected 1, 0')]
    by_position, other = Classes(("bad", "good")), source()
    by_position.numbers(other, rows(1, 0, -1))
    assert by_position.settle()[0] == [1, 0, 0]
    assert other.faults.kept == [(3, 'label "-1" is out of range: expected 0, 1')]


def test_long_labels_and_many_names_make_short_faults() -> None:
    classes, found = Classes([f"c{at}" for at in range(5000)]), source()
    classes.numbers(found, rows("c7", "x" * 10**6))
    classes.settle()
    [(line, text)] = found.faults.kept
    assert line == 2
    assert len(text) < 300
    assert text.endswith("c19 and 4,980 more")


def test_a_column_that_is_no_class_is_refused() -> None:
    with pytest.raises(DataError, match="no column of classes"):
        Classes(None).numbers(source(), rows(*range(LARGEST + 1)))


def test_names_that_only_look_like_numbers_are_sorted_as_text() -> None:
    classes = Classes(None)
    classes.numbers(source(), rows("3", "--5"))
    assert classes.settle() == ([1, 0], ("--5", "3"))
