"""Fair sweeps, trials counted, resumption, and entrants that cannot take part."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sidepath.compare.contest import best_rate
from sidepath.config import TrainConfig
from sidepath.errors import TrainError

from .kit import Counted, TinyBases, contest, entrants, table_in


def test_each_entrant_sweeps_as_much_and_runs_its_own_best_rate(tmp_path: Path) -> None:
    run = Counted()
    with table_in(tmp_path) as table:
        standings = contest(table, run).run()
    counts = Counter((trial.entrant.label, trial.phase) for trial in run.asked)
    assert counts == {
        ("lora", "sweep"): 2,
        ("probe", "sweep"): 2,
        ("lora", "final"): 3,
        ("probe", "final"): 3,
    }
    assert {trial.seed for trial in run.asked if trial.phase == "sweep"} == {0}
    finals = [trial for trial in run.asked if trial.phase == "final"]
    assert {trial.learning_rate for trial in finals} == {1e-2}
    assert [standing.values for standing in standings] == [{0: 0.0, 1: 1.0, 2: 2.0}] * 2


def test_one_rate_needs_no_sweep(tmp_path: Path) -> None:
    run = Counted()
    with table_in(tmp_path) as table:
        contest(table, run, *entrants(rates=(1e-3,))).run()
    assert {trial.phase for trial in run.asked} == {"final"}


def test_no_trial_runs_twice(tmp_path: Path) -> None:
    killed = Counted(fails_after=6)
    with table_in(tmp_path) as table, pytest.raises(KeyboardInterrupt):
        contest(table, killed).run()
    again = Counted()
    with table_in(tmp_path) as table:
        contest(table, again).run()
    assert (len(killed.asked), len(again.asked)) == (6, 4)
    keys = [(trial.phase, trial.key) for trial in [*killed.asked, *again.asked]]
    assert len(set(keys)) == 10
    nothing = Counted()
    with table_in(tmp_path) as table:
        contest(table, nothing).run()
    assert not nothing.asked


def test_what_determines_a_trial_is_in_its_key(tmp_path: Path) -> None:
    """More seeds add trials; other rows, another base, budget or setting make all anew."""
    asked = []
    for changes in (
        {},
        {"seeds": (0, 1, 2, 3)},
        {"limit": 30},
        {"bases": TinyBases("other")},
        {"train": TrainConfig(steps=3, batch_size=4)},
    ):
        run = Counted()
        with table_in(tmp_path) as table:
            contest(table, run, **changes).run()
        asked.append(len(run.asked))
    assert asked == [10, 2, 10, 10, 10]
    run = Counted()
    with table_in(tmp_path) as table:
        contest(table, run, *entrants({"name": "lora", "r": 3}, {"name": "probe"})).run()
    assert {trial.entrant.label for trial in run.asked} == {"lora"}, "the probe's are known"


def test_entrants_that_differ_in_name_alone_are_trained_once(tmp_path: Path) -> None:
    run = Counted()
    twins = entrants({"name": "probe"}, {"name": "probe", "label": "again"})
    with table_in(tmp_path) as table:
        standings = contest(table, run, *twins).run()
    assert len(run.asked) == 5
    assert standings[0].values == standings[1].values


def test_a_method_that_cannot_adapt_the_base_is_reported(tmp_path: Path) -> None:
    run = Counted(failing=lambda trial: trial.entrant.label == "probe")
    given = entrants({"name": "bitfit"}, {"name": "lora"}, {"name": "probe"})
    with table_in(tmp_path) as table:
        bitfit, lora, probe = contest(table, run, *given).run()
    assert "no bias to train" in str(bitfit.reason)
    assert probe.reason == "it burst"
    assert lora.reason is None
    assert len(lora.values) == 3
    assert {trial.entrant.label for trial in run.asked} == {"lora", "probe"}


def test_only_all_of_them_failing_is_an_error(tmp_path: Path) -> None:
    run = Counted(failing=lambda trial: True)
    with table_in(tmp_path) as table, pytest.raises(TrainError, match="no entrant") as error:
        contest(table, run).run()
    assert error.value.faults == ["lora: it burst", "probe: it burst"]
    with table_in(tmp_path) as table, pytest.raises(TrainError, match="no bias to train"):
        contest(table, run, *entrants({"name": "bitfit"})).run()


def test_a_seed_that_failed_is_left_out_of_the_values(tmp_path: Path) -> None:
    run = Counted(failing=lambda trial: trial.phase == "final" and trial.seed == 1)
    with table_in(tmp_path) as table:
        standings = contest(table, run).run()
    assert list(standings[0].values) == [0, 2]
    assert dataclasses.asdict(standings[0])["finals"][1] == {"failed": "it burst"}


def test_the_best_rate() -> None:
    sweep: dict[float, dict[str, Any]] = {
        1e-3: {"value": 0.8, "loss": 0.5},
        3e-3: {"value": 0.9, "loss": 0.4},
        1e-2: {"value": 0.9, "loss": 0.3},
        3e-2: {"failed": "burst"},
    }
    assert best_rate(sweep, higher_is_better=True) == 1e-2
    assert best_rate(sweep, higher_is_better=False) == 1e-3
    assert best_rate({1.0: {"failed": "burst"}}, higher_is_better=True) is None
