"""The report: numbers shown are the result's, text is escaped, nothing is fetched."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sidepath.demo.report import running_mean, score_rows, table, write_report


def result() -> dict[str, Any]:
    task = {
        "name": "sql",
        "description": "A question becomes SQL.",
        "metric": "exact_match",
        "audit": {"rows": 10, "supervised_share": 0.25, "end_token_share": 1.0, "truncated": 0},
        "base": 1.25,
        "lora": 96.5,
        "full": 97.0,
        "lora_trainable": 1234,
        "full_trainable": 99999,
        "lora_bytes": 5000,
        "full_bytes": 400000,
        "seconds": 3.21,
        "full_seconds": 6.54,
        "lora_losses": [3.0, 2.0, 1.0],
        "full_losses": [3.0, 1.0, 0.5],
        "samples": [{"prompt": "a < b & c", "completion": "x", "base": "<script>", "lora": "x"}],
    }
    parity = {"max_abs": 1e-6, "mean_abs": 1e-7, "top1": 1.0, "kl": 0.0}
    return {
        "tasks": [task],
        "parity": {**parity, "each": {"sql": parity}},
        "routed_equal": True,
        "routed": {
            "rows": 2,
            "adapters": ["sql", None],
            "tokens_equal": True,
            "max_abs": 1e-6,
            "texts": ["SELECT", "once"],
        },
        "seconds": 42.0,
    }


class Collector(HTMLParser):
    """Tags, their attributes, and the visible text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


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


def test_tables_escape_and_scores_have_three_lines_a_task() -> None:
    assert "&lt;b&gt;" in table(("a",), [("<b>",)])
    assert [row[1] for row in score_rows(result()["tasks"])] == ["base", "LoRA", "full fine-tuning"]


def test_running_mean_against_the_obvious_loop() -> None:
    assert running_mean([4.0, 2.0, 0.0], 2) == [4.0, 3.0, 1.0]
    assert running_mean([], 3) == []
