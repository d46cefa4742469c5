"""Others on the machine are noticed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from sidepath.bench.crowd import Crowd, busy_seconds, watched_crowd


def stat(path: Path, user: int, idle: int) -> Path:
    path.write_text(f"cpu  {user} 0 100 {idle} 7 0 10 20 0 0\ncpu0 1 2 3\n")
    return path


def test_busy_seconds_leave_idling_and_waiting_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    assert busy_seconds(stat(tmp_path / "stat", 1000, 99_999)) == (1000 + 100 + 10 + 20) / 100


@pytest.mark.parametrize("text", ["", "cpu", "cpu a b c d e f g h"])
def test_a_system_that_does_not_say(tmp_path: Path, text: str) -> None:
    path = tmp_path / "stat"
    assert busy_seconds(path) is None
    path.write_text(text)
    assert busy_seconds(path) is None
    with watched_crowd(path) as found:
        pass
    assert found.share is None
    assert found.note is None


def test_the_share_is_of_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds on two cores: ours used 8 processor seconds, all together 14."""
    path = stat(tmp_path / "stat", 0, 0)
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    clocks = iter([0.0, 10.0]), iter([1.0, 9.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clocks[0]))
    monkeypatch.setattr(time, "process_time", lambda: next(clocks[1]))
    with watched_crowd(path) as found:
        stat(path, 1400, 50)
    assert found.share == pytest.approx(6 / 20)
    assert found.note is not None
    assert "others used 30%" in found.note


def test_a_quiet_machine_is_not_spoken_of() -> None:
    assert Crowd(0.01).note is None
    assert Crowd(0.2).note is not None


def test_a_share_of_this_machine_is_a_share() -> None:
    with watched_crowd() as found:
        time.sleep(0.02)
    assert found.share is None or 0 <= found.share <= 1
