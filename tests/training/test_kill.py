"""Runs stopped anywhere and resumed end with the unbroken run's bits (see `killing`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sidepath.config import TrainConfig
from sidepath.training.data import load_data
from sidepath.training.loop import train
from tests.training.killing import TRAIN, weights_of
from tests.training.kit import llama, with_lora

ROOT = Path(__file__).resolve().parents[2]


def called(code: str) -> Any:
    """The JSON that a fresh Python prints: its children are forked before torch has threads."""
    paths = [str(ROOT), str(ROOT / "src")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


PRINT = """
import dataclasses, json
from tests.training import kill_kinds
rows = {}
print(json.dumps([dataclasses.asdict(row) for row in rows]))
"""


def require_equal(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["exceptions"] == [], row
        assert row["kills"] > 0, row
        assert row["runs"] > 0, row
        assert row["equal"] == row["runs"], row


QUICK = """
import dataclasses, json
from sidepath.training import state
from tests.training import kill_kinds
rows = kill_kinds.quick()
state.restore_state = lambda *args: None  # a resume that loses a piece of the state
rows.append(kill_kinds.each_step(steps=(5,)))
print(json.dumps([dataclasses.asdict(row) for row in rows]))
"""


def test_every_kind_of_kill_thinned_out() -> None:
    *rows, not_equal = called(QUICK)
    require_equal(rows)
    kinds = {row["kind"]: row for row in rows}
    assert kinds["os._exit after each step"]["kills"] == 3
    assert kinds["killed at each file operation of a save"]["kills"] > 5
    assert kinds["SIGKILL at random moments"]["kills"] == 5
    assert all(row["fallbacks"] == 0 for row in rows), "a kill never damages a checkpoint"
    # The comparison sees a run that is not the same: here losses and weights differ.
    assert (not_equal["runs"], not_equal["equal"], not_equal["exceptions"]) == (1, 0, [])


@pytest.mark.slow
def test_every_kind_of_kill_at_every_place() -> None:
    rows = called(PRINT.format("kill_kinds.whole(100, kill_kinds.PLAIN)"))
    require_equal(rows)
    assert rows[-1]["kills"] == 100
    assert set(rows[-1]["places"]) == {"start-up", "step", "save"}


def test_a_loop_that_is_closed_after_each_step(tmp_path: Path, tokenizer: Any, pairs: Any) -> None:
    data, config = load_data(pairs, tokenizer), TrainConfig(**TRAIN)

    def run(folder: Path, stop: int = 0) -> tuple[list[tuple[int, str]], str]:
        model = with_lora(llama(), dropout=0.2, r=3)
        losses = []
        steps = train(model, data, config, checkpoints=folder, resume=True)
        for report in steps:
            losses.append((report.number, report.loss.hex()))
            if report.number == stop:
                steps.close()  # type: ignore[attr-defined]
                break
        return losses, weights_of(model)

    expected = run(tmp_path / "whole")
    losses = []
    for stop in range(1, 21):  # twenty stops in a row, one after each step
        pieces, weights = run(tmp_path / "cut", stop)
        losses += pieces
    assert [number for number, _ in losses] == list(range(1, 21))
    assert losses == expected[0]
    # The last piece was closed after the best state had been put back.
    assert weights == expected[1]
