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
from sidepath.data.dataset import load_data
from sidepath.training.feed import Feed
from sidepath.training.loop import train
from sidepath.training.order import Order
from tests.training import kill_signals
from tests.training.killing import DRAWN, PACKED, SETTINGS, STEPS, TRAIN, data_of, weights_of
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
from tests.training import kill_joined, kill_kinds, kill_signals
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
from tests.training import kill_joined, kill_kinds, kill_signals
rows = [*kill_kinds.quick(), *kill_signals.quick(), *kill_joined.quick()]
orphaned = kill_signals.orphans()
state.restore_state = lambda *args: None  # a resume that loses a piece of the state
rows.append(kill_kinds.each_step(steps=(5,)))
rows.append(kill_joined.each_step(steps=(5,)))
print(json.dumps([[dataclasses.asdict(row) for row in rows], orphaned]))
"""


def test_every_kind_of_kill_thinned_out() -> None:
    (*rows, not_equal, pair_not_equal), orphaned = called(QUICK)
    require_equal(rows)
    kinds = {row["kind"]: row for row in rows}
    assert kinds["os._exit after each step"]["kills"] == 3
    assert kinds["killed at each file operation of a save"]["kills"] > 5
    assert kinds["SIGKILL at random moments"]["kills"] == 5
    assert {row["setting"] for row in rows} == set(SETTINGS)
    assert all(row["fallbacks"] == 0 for row in rows), "a kill never damages a checkpoint"
    # The comparison sees a run that is not the same: here losses and weights differ.
    for other in (not_equal, pair_not_equal):
        assert (other["runs"], other["equal"], other["exceptions"]) == (1, 0, [])
    assert orphaned < kill_signals.ORPHAN_LIMIT, "no worker outlives a killed run for long"


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_kind_of_kill_at_every_place(setting: str) -> None:
    rows = called(PRINT.format(f"kill_kinds.whole(100, {setting!r})"))
    require_equal(rows)
    assert rows[-1]["kills"] == 100
    assert set(rows[-1]["places"]) == {"start-up", "step", "save"}


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_kind_of_kill_in_two_processes(setting: str) -> None:
    rows = called(PRINT.format(f"kill_joined.whole(20, {setting!r})"))
    require_equal(rows)
    assert [row["kills"] for row in rows] == [20, 20, 20, 20]


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_sigterm_at_random_moments(setting: str) -> None:
    rows = called(PRINT.format(f"kill_signals.whole(50, 20, {setting!r})"))
    require_equal(rows)
    assert [row["kills"] for row in rows] == [50, 50, 20]
    assert all(row["places"]["running"] > 10 for row in rows)


def test_packed_rows_are_packed_and_drawn_rows_drawn() -> None:
    packed, _ = data_of(PACKED).split(TRAIN["eval_share"], seed=0)
    size = TRAIN["batch_size"] * TRAIN["accumulate"]
    order = Order(
        packed.lengths,
        [(part.start, part.stop, part.weight) for part in packed.parts],
        size=size,
        seed=0,
        capacity=packed.max_tokens,
    )
    steps = [order.at(step)[1] for step in range(STEPS)]
    assert all(any(len(bin_) > 1 for bin_ in bins) for bins in steps)
    batches = list(Feed(packed, order, TRAIN["batch_size"], 0).steps(0, STEPS, 0))
    assert all(len(step) == TRAIN["accumulate"] for step in batches), "three passes a step"
    assert any(len(batch.rows) > len(batch.ids_BT) for step in batches for batch in step)
    made = data_of(DRAWN)
    first, later = (made.example(0, seed=0, epoch=epoch).ids_T.tolist() for epoch in (0, 1))
    assert first != later


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
