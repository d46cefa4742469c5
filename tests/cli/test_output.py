"""What goes where, on a terminal and in a pipe."""

from __future__ import annotations

import io
import json
import math
import sys
import time

import pytest

from sidepath.cli import output
from sidepath.cli.output import Report, Table, cell, plain_table, progress, show


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


TABLE = Table("Title", ["name", "value"], [["a[b]", 1234], ["c", 0.123456]])


def test_plain_tables_are_columns_without_drawing() -> None:
    assert plain_table(TABLE) == "Title\nname  value\na[b]  1,234\nc     0.1235"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (True, "yes"), (1234567, "1,234,567"), (1e-9, "1e-09"), ("a\nb", "a⏎b")],
)
def test_cells(value: object, text: str) -> None:
    assert cell(value) == text


def test_a_pipe_gets_plain_text_and_a_terminal_a_drawn_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report({"a": 1}, ["said", TABLE])
    show(report, as_json=False)
    assert capsys.readouterr().out == f"said\n{plain_table(TABLE)}\n"
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    show(report, as_json=False)
    assert "a[b]" in terminal.getvalue()
    assert "┃" in terminal.getvalue()


def test_json_is_one_document_that_any_parser_reads(capsys: pytest.CaptureFixture[str]) -> None:
    show(Report({"a": [math.nan, math.inf, 1.5], "b": ("é",)}, ["not shown"]), as_json=True)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found == {"a": [None, None, 1.5], "b": ["é"]}


def test_progress_in_a_pipe_is_a_line_now_and_then_and_one_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(float(second) for second in range(100))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(output, "SECONDS_BETWEEN_LINES", 4.0)
    with progress("step") as advance:
        for number in range(1, 11):
            advance(number, 10, f"loss {number}")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "step 1/10, loss 1, 9 s left",
        "step 5/10, loss 5, 5 s left",
        "step 9/10, loss 9, 1 s left",
        "step 10/10, loss 10",
    ]


def test_progress_on_a_terminal_is_a_bar_on_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("step") as advance:
        advance(3, 3, "loss 0.5")
    assert "3/3" in terminal.getvalue()
    assert "loss 0.5" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_progress_of_nothing_done_yet(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("layers") as advance:
        advance(0, 3)
    assert capsys.readouterr().err == "layers 0/3\n"
