"""The figures for people."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sidepath.bench import report
from sidepath.bench.figure import Figure
from sidepath.bench.report import HEAD, markdown, notes, shown, table_rows, write
from sidepath.bench.timing import Spread


@pytest.fixture
def document(figures: list[Figure]) -> dict[str, Any]:
    return {
        "figures": [figure.as_dict() for figure in figures],
        "machine": "a processor, 2 cores",
        "rounds": 3,
        "notes": ["quick"],
    }


def test_ratios_come_first_and_each_figure_is_named_once(figures: list[Figure]) -> None:
    rows = table_rows(figures)
    assert all(len(row) == len(HEAD) for row in rows)
    assert rows[0] == [
        "step-x",
        "ours / floor",
        "1.00 (0.90 to 1.10)",
        "<= 0.95",
        "no",
        "2,000 ms",
        "3,000 ms",
    ]
    assert [row[0] for row in rows if row[0]] == ["step-x", "memory-x", "inject-x"]
    assert rows[-1] == [
        "inject-x",
        "ours",
        "20 ms (10 ms to 30 ms)",
        "<= 20 ms",
        "yes",
        "20 ms",
        "-",
    ]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.00004, "seconds", "0.04 ms"),
        (0.0123456, "seconds", "12.3 ms"),
        (1.5, "seconds", "1,500 ms"),
        (12.3, "seconds", "12.3 s"),
        (2**21, "bytes", "2.0 MiB"),
        (1234, "calls", "1,234"),
    ],
)
def test_values_as_people_read_them(value: float, unit: Any, text: str) -> None:
    assert shown(value, unit) == text


def test_a_spread_of_one_value_has_no_range() -> None:
    assert report.spread_text(Spread(1, 1, 1), str) == "1"


def test_the_page_says_what_was_measured_where(
    figures: list[Figure], document: dict[str, Any]
) -> None:
    page = markdown(figures, document)
    assert "| figure | of | median (min to max) |" in page
    assert "- step-x: a step; a note" in page
    assert "a processor, 2 cores; 3 rounds" in page
    assert page.rstrip().endswith("- quick")
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1


def test_the_bound_stands_beside(figures: list[Figure], document: dict[str, Any]) -> None:
    bound = dataclasses.replace(figures[0], bound=1.8333, peak_bytes={"ours": 2**20})
    assert notes([bound], document)[0] == (
        "step-x: a step; memory's bound 1.83; a note; ours 1.0 MiB at most"
    )


def test_the_folder_holds_json_table_and_picture(
    figures: list[Figure], document: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "new" / "folder"
    for _ in range(2):
        written = write(folder, figures, document)
    assert sorted(written) == sorted(path.name for path in folder.iterdir())
    assert json.loads((folder / "bench.json").read_text()) == document
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "step-x" in (folder / "bench.md").read_text()


def test_without_matplotlib_there_is_no_picture(
    figures: list[Figure],
    document: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report, "has_matplotlib", lambda: False)
    assert write(tmp_path, figures, document) == ["bench.json", "bench.md"]
