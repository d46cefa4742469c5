"""Texts to calibrate with, as files hold them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidepath.cli.calibration import calibration_of
from sidepath.data import tables
from sidepath.errors import DataError


def test_a_line_without_an_end_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "LINE", 100)
    (tmp_path / "a.txt").write_text("short\n" + "x" * 101)
    with pytest.raises(DataError, match="longer than 100"):
        calibration_of(str(tmp_path / "a.txt"))


def test_lines_are_texts_and_a_byte_order_mark_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffOne. \r\n\nTwo".encode())
    assert calibration_of(str(tmp_path / "a.txt")) == ["One.", "Two"]
