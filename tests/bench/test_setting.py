"""What is measured with, and where."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from sidepath.bench import setting
from sidepath.bench.peers import has_peft
from sidepath.bench.setting import Bench, machine, versions


def test_the_machine_is_one_line_without_a_path() -> None:
    line = machine()
    assert "\n" not in line
    for secret in (os.getcwd(), str(Path.home()), os.sep):
        assert secret not in line
    assert f"torch {torch.__version__}" in line
    assert f"{torch.get_num_threads()} threads" in line


def test_a_machine_without_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setting, "Path", lambda name: Path("no such file"))
    assert "cores" in machine()


def test_versions() -> None:
    found = versions(("torch", "no-such-package"))
    assert found == {"torch": torch.__version__, "no-such-package": None}


def test_quick_is_small_and_full_size_is_what_was_asked_for() -> None:
    assert Bench(quick=True).rows(64) < 64
    assert Bench(quick=True).tokens(256) < 256
    assert (Bench().rows(64), Bench().tokens(256), Bench(5).counted_rounds) == (64, 256, 5)


@pytest.mark.usefixtures("without_peft")
def test_a_missing_peer_is_noticed() -> None:
    assert not has_peft()
