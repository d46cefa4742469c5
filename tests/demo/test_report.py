"""The report: numbers shown are the result's, text is escaped, nothing is fetched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sidepath.demo.report import facts, samples, score_rows, write_report
from tests.demo.sample import result
from tests.pages import Collector


def test_the_report_shows_the_results_own_numbers_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "report.html"
    write_report(path, result())
    text = path.read_text()
    page = Collector()
    page.feed(text)
    for shown in ("96.5", "97.0", "1.2", "1,234", "99,999", "42 seconds", "1.00e-06"):
        assert shown in page.text
    assert "<script>" in page.text, "shown as text"
    names = [name for name, _ in page.tags]
    assert "script" not in names
    assert "svg" in names
    assert not [value for _, attrs in page.tags for key, value in attrs.items() if key == "src"]
    assert not re.search(r"@import|url\((?!#)", text)
    assert any(attrs.get("aria-label") for _, attrs in page.tags)


def test_a_difference_is_said_loudly(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, {**result(), "routed_equal": False})
    assert "DIFFERS" in path.read_text()


def test_scores_have_three_lines_a_task() -> None:
    assert [row[1] for row in score_rows(result()["tasks"])] == ["base", "LoRA", "full fine-tuning"]


def test_the_terminal_shows_samples_and_what_was_proved() -> None:
    assert samples(result()["tasks"])[0].splitlines()[1] == "  prompt      a < b & c"
    said = " ".join(facts(result()))
    assert "1.0e-06" in said
    assert "equals one row at a time" in said
    assert "DIFFERS" in " ".join(facts({**result(), "routed_equal": False}))
