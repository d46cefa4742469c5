"""Rows, verdicts, Markdown and the picture of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sidepath.compare.contest import Standing
from sidepath.compare.outcome import excluded, rows_of, verdict
from sidepath.compare.picture import drawn, frontier, picture
from sidepath.compare.report import markdown, notes, table_rows, write
from sidepath.compare.statistics import difference
from sidepath.errors import StoreError

from .kit import entrants


def standing(at: int, values: list[float], trainable: int) -> Standing:
    entrant = entrants({"name": "lora"}, {"name": "probe"}, {"name": "full"})[at]
    costs = {"seconds": 2.0, "peak_memory_bytes": 2**20, "steps": 3}
    return Standing(
        entrant,
        {"trainable": trainable, "bytes": 4 * trainable},
        {rate: {"value": 0.5, "loss": rate} for rate in entrant.learning_rates},
        entrant.learning_rates[0],
        {seed: {"value": value, **costs} for seed, value in enumerate(values)},
    )


def document(*standings: Standing) -> dict[str, Any]:
    return {
        "rows": rows_of(standings, "accuracy", {}),
        "excluded": excluded(standings),
        "metric": "accuracy",
        "higher_is_better": True,
        "data": {"name": "rows", "train": 40, "validation": 4, "test": 6},
        "base": "tiny",
    }


def test_the_rows() -> None:
    first, better, same = (
        standing(0, [0.5, 0.6, 0.7], 10),
        standing(1, [0.71, 0.8, 0.91], 20),
        standing(2, [0.5, 0.61, 0.69], 5),
    )
    rows = document(first, better, same)["rows"]
    assert rows[0]["metric"]["values"] == [0.5, 0.6, 0.7]
    assert rows[0]["metric"]["mean"] == pytest.approx(0.6)
    # s = 0.1, half width 4.302653 * 0.1 / sqrt(3)
    assert rows[0]["metric"]["low"] == pytest.approx(0.6 - 0.248414, abs=1e-5)
    assert rows[0]["beside_first"] is None
    assert rows[1]["beside_first"]["distinguishable"] is True
    assert rows[1]["beside_first"]["mean"] == pytest.approx(0.2067, abs=1e-4)
    assert rows[2]["beside_first"]["distinguishable"] is False
    assert rows[2]["beside_first"]["verdict"].startswith("not distinguishable")
    assert rows[1]["at_edge"] is True
    assert rows[1]["peak_memory_bytes"] == 2**20


def test_pairs_are_made_by_seed() -> None:
    first, second = standing(0, [0.5, 0.6, 0.7], 10), standing(1, [0.6, 0.7, 0.9], 20)
    del first.finals[2]
    row = rows_of([first, second], "accuracy", {})[1]
    assert (row["beside_first"]["pairs"], len(row["metric"]["values"])) == (2, 3)


def test_verdicts() -> None:
    assert "nothing can be said" in verdict(difference([1.0], [0.5]), None)
    assert "no difference" in verdict(difference([1.0, 2.0], [1.0, 2.0]), None)
    assert "same difference" in verdict(difference([1.0, 2.0], [0.0, 1.0]), None)
    assert verdict(difference([1.0, 2.2], [2.0, 3.1]), 0.01).startswith("lower")


def test_the_frontier() -> None:
    points = [
        ("a", 10.0, 0.5),
        ("b", 20.0, 0.4),
        ("c", 20.0, 0.7),
        ("d", 30.0, 0.7),
        ("e", 5.0, 0.1),
    ]
    assert frontier(points, higher=True) == ["e", "a", "c"]
    assert frontier(points, higher=False) == ["e"]


def test_the_picture_shows_the_seeds_however_long_their_interval_is() -> None:
    """Two seeds a tenth apart have an interval of 1.3 to each side."""
    pytest.importorskip("matplotlib")
    found = document(standing(0, [0.5, 0.6], 10), standing(1, [0.6, 0.8], 20))
    assert found["rows"][0]["metric"]["low"] < 0
    low, high = drawn(found).axes[0].get_ylim()
    assert 0.4 < low < 0.5
    assert 0.8 < high < 0.9
    assert drawn(document(standing(0, [0.5, 0.5], 10))).axes[0].get_ylim()[0] < 0.5
    found["intrinsic"] = {"target": 0.55}
    lines: list[Any] = drawn(found).axes[0].get_lines()
    assert any(set(line.get_ydata()) == {0.55} for line in lines)


def test_entrants_of_one_budget_stand_side_by_side() -> None:
    pytest.importorskip("matplotlib")
    found = document(standing(0, [0.5, 0.6], 1000), standing(1, [0.6, 0.8], 1010))
    axis = drawn(found).axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["lora", "probe"]
    assert axis.get_xscale() == "linear"
    apart = document(standing(0, [0.5, 0.6], 1000), standing(1, [0.6, 0.8], 2000))
    assert drawn(apart).axes[0].get_xscale() == "log"


def test_for_people(tmp_path: Path) -> None:
    out = Standing(entrants({"name": "bitfit"})[0], reason="no bias to train\n  next: another")
    found = document(standing(0, [0.5, 0.6], 10), standing(1, [0.6, 0.8], 20), out)
    text = markdown(found)
    assert "| lora | 10 | 40 | 0.001 | 0.55 |" in text
    assert "bitfit took no part: no bias to train; next: another" in text
    assert "cannot fall below 0.5" in text
    assert "two seeds" in text
    assert len(table_rows(found)) == 2
    assert any("sweep's edge" in note for note in notes(found))
    pytest.importorskip("matplotlib")
    assert picture(found).startswith(b"\x89PNG")
    assert write(tmp_path, found) == ["compare.json", "compare.md", "pareto.png"]
    assert (tmp_path / "pareto.png").read_bytes() == picture(found)


def test_a_report_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        write(tmp_path / "file", document(standing(0, [0.5, 0.6], 10)))
