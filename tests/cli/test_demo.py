"""The verb demo hands over what was asked and prints what came back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.demo.sample import result

from .conftest import Run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the verb asked of the demonstration, which is played by a stand-in."""
    found: dict[str, Any] = {}

    def run_demo(
        output: Path, *, seed: int, progress: Callable[..., Any], say: Callable[[str], None]
    ) -> dict[str, Any]:
        found.update(output=output, seed=seed)
        say("training")
        with progress("sql") as advance:
            advance(1, 1, "loss 0.1")
        return result()

    module = ModuleType("sidepath.demo.run")
    module.__dict__["run_demo"] = run_demo
    monkeypatch.setitem(sys.modules, "sidepath.demo.run", module)
    return found


def test_demo(run: Run, asked: dict[str, Any], tmp_path: Path) -> None:
    ran = run("demo", "--output", tmp_path, "--seed", 3, "--json")
    assert ran.document == result()
    assert asked == {"output": tmp_path, "seed": 3}
    assert ran.err.splitlines() == ["training", "sql 1/1, loss 0.1"]


def test_demo_for_people(run: Run, asked: dict[str, Any], tmp_path: Path) -> None:
    out = run("demo", "--output", tmp_path).out
    assert "sql (exact match)  base              1.2    0" in out
    assert "LoRA              96.5   1,234" in out
    assert "a mixed batch of 2 rows over 1 adapters and the base equals one row at a time" in out
