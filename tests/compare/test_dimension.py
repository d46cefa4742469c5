"""The search for a task's intrinsic dimension, held against trying every dimension."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sidepath.analyse.intrinsic import spread
from sidepath.compare.dimension import Search, inside, run_search
from sidepath.compare.report import markdown, verdict_of_search
from sidepath.compare.setting import Setting, Trial
from sidepath.compare.trial import facts_of, fresh
from sidepath.compare.workers import Workers
from sidepath.errors import ConfigError, TrainError
from sidepath.injection.merging import merge
from sidepath.methods.intrinsic import IntrinsicDimension

from .kit import entrants, setting, silent

RANGE = (10, 640, 7)


@dataclasses.dataclass
class ByDimension:
    """Stands for training: full fine-tuning scores 0.9, a dimension what `score` says of it."""

    score: Callable[[int, int], float] = lambda d, seed: 0.0
    """By dimension and seed; NaN stands for a trial that fails."""
    full: float = 0.9
    asked: list[Trial] = dataclasses.field(default_factory=list)
    stops_after: int | None = None

    def __call__(self, setting: Setting, trial: Trial) -> dict[str, Any]:
        if self.stops_after is not None and len(self.asked) >= self.stops_after:
            raise KeyboardInterrupt
        self.asked.append(trial)
        config = trial.entrant.config
        value = self.full
        if isinstance(config, IntrinsicDimension):
            value = self.score(config.d, trial.seed)
        if math.isnan(value):
            return {"failed": "it burst"}
        costs = {"seconds": 1.0, "peak_memory_bytes": 10, "steps": 2}
        return {"value": value, "loss": trial.learning_rate, **costs}


def search(folder: Path, run: Any, **changes: Any) -> Search:
    (full,) = entrants({"name": "full"})
    options: dict[str, Any] = {"kind": "said", "share": 0.9, "dimensions": RANGE} | changes
    given = options.pop("setting", setting(metric=None))
    return Search(given, full, folder / "out", Workers(1, "processes", run), **options)


def found_by(folder: Path, run: Any, **changes: Any) -> dict[str, Any]:
    return run_search(search(folder, run, **changes), progress=silent, say=lambda _: None)


@pytest.mark.parametrize("needed", [10, 161, 641])
def test_it_finds_what_trying_every_dimension_finds(tmp_path: Path, needed: int) -> None:
    def score(d: int, seed: int) -> float:
        return (0.85 if d >= needed else 0.6) + 0.01 * seed

    found = found_by(tmp_path, ByDimension(score))["intrinsic"]
    means = {d: sum(score(d, seed) for seed in range(3)) / 3 for d in spread(*RANGE)}
    assert found["d"] == min((d for d, mean in means.items() if mean >= 0.9 * 0.9), default=None)
    assert len(found["trials"]) <= 1 + math.ceil(math.log2(7))
    assert all(trial["score"] == pytest.approx(means[trial["d"]]) for trial in found["trials"])


def test_the_document(tmp_path: Path) -> None:
    run = ByDimension(lambda d, seed: 0.5 + 0.1 * seed if d < 100 else 0.84 + 0.01 * seed)
    document = found_by(tmp_path, run)
    assert next(row["method"] for row in document["rows"]) == "full"
    found = document["intrinsic"]
    assert (found["full"], found["target"]) == pytest.approx((0.9, 0.81))
    assert (found["kind"], found["dimensions"]) == ("said", [10, 20, 40, 80, 160, 320, 640])
    by_d = {trial["d"]: trial for trial in found["trials"]}
    assert (found["d"], sorted(by_d)) == (160, [80, 160, 320, 640])
    assert by_d[80]["values"] == pytest.approx([0.5, 0.6, 0.7])
    assert (by_d[80]["score"], by_d[80]["reached"]) == (pytest.approx(0.6), False)
    assert by_d[80]["low"] < 0.6 < by_d[80]["high"]
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["intrinsic"] == found
    told = markdown(document)
    assert "d90 = 160 trained numbers reach 0.9 x 0.9 of full fine-tuning = 0.81" in told
    assert "| 80 | 0.6 | 0.3516 to 0.8484 | short of it |" in told


def test_the_verdict_says_which_way_to_search_on() -> None:
    found = {"share": 0.9, "full": 0.5, "target": 0.45, "dimensions": [10, 640]}
    (above,) = verdict_of_search({"intrinsic": {**found, "d": None}})
    assert "d90 is above 640" in above
    (least,) = verdict_of_search({"intrinsic": {**found, "d": 10}})
    assert "search lower" in least
    (bound,) = verdict_of_search({"intrinsic": {**found, "d": 640, "share": 0.995}})
    assert bound.startswith("d99.5 = 640")
    assert verdict_of_search({}) == []


def test_a_killed_search_goes_on_where_it_was(tmp_path: Path) -> None:
    scores = ByDimension(lambda d, seed: float(d >= 80))
    whole = found_by(tmp_path / "whole", scores)
    for label in ("full", "d = 40", "d = 640"):  # each at the budget of the others
        asked = [(one.phase, one.seed) for one in scores.asked if one.entrant.label == label]
        assert asked == [("sweep", 0), ("sweep", 0), ("final", 0), ("final", 1), ("final", 2)]
    killed = ByDimension(scores.score, stops_after=13)
    with pytest.raises(KeyboardInterrupt):
        found_by(tmp_path, killed)
    again = ByDimension(scores.score)
    document = found_by(tmp_path, again)
    assert document["intrinsic"] == whole["intrinsic"]
    assert len(killed.asked) + len(again.asked) == len(scores.asked)
    nothing = ByDimension(scores.score)
    assert found_by(tmp_path, nothing)["trials"]["ran"] == len(nothing.asked) == 0


def test_a_dimension_that_fails_in_one_seed_reaches_nothing(tmp_path: Path) -> None:
    run = ByDimension(lambda d, seed: math.nan if seed == 1 and d < 320 else 0.9)
    document = found_by(tmp_path, run)
    found = document["intrinsic"]
    assert found["d"] == 320
    assert [trial["score"] for trial in found["trials"] if not trial["reached"]] == [None, None]
    burst = ByDimension(lambda d, seed: math.nan if d < 640 else 0.9)
    document = found_by(tmp_path / "all", burst)
    assert document["intrinsic"]["d"] == 640
    assert {one["reason"] for one in document["excluded"]} == {"it burst"}


def test_without_a_full_score_there_is_nothing_to_reach(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="it burst"):
        found_by(tmp_path, ByDimension(full=math.nan))
    with pytest.raises(ConfigError, match="the score of full fine-tuning"):
        found_by(tmp_path / "other", ByDimension(full=0.0))


def test_what_is_impossible_is_said_before_anything_is_made(tmp_path: Path) -> None:
    run = ByDimension()
    with pytest.raises(ConfigError, match="more is better") as error:
        found_by(tmp_path, run, setting=setting(metric="perplexity"))
    assert "exact_match" in str(error.value.expected)
    assert "loss" not in str(error.value.expected)
    with pytest.raises(ConfigError, match="in these dimensions") as error:
        found_by(tmp_path, run, dimensions=(2, 10**9, 5))
    assert [fault.partition(":")[0] for fault in error.value.faults] == ["d = 2", "d = 1000000000"]
    assert not run.asked
    assert not (tmp_path / "out").exists()


def test_the_dimensions_follow_from_the_base(tmp_path: Path) -> None:
    run = ByDimension(lambda d, seed: 0.9)
    grid = found_by(tmp_path, run, dimensions=None)["intrinsic"]["dimensions"]
    D = facts_of(fresh(setting(metric=None), search(tmp_path, run).full, 0))["trainable"]
    assert (grid[0], grid[-1], len(grid)) == (100, D // 10, 12)


@pytest.mark.parametrize("kind", ["did", "said"])
def test_a_step_in_few_dimensions_is_as_long_as_one_in_all(tmp_path: Path, kind: str) -> None:
    """A step of the rate in every trained number moves the parameters by `rate x sqrt(D)`."""
    given = search(tmp_path, ByDimension(), kind=kind)
    D = facts_of(fresh(given.setting, given.full, 0))["trainable"]
    entrant = inside(given, 300, D)
    assert len(entrant.learning_rates) == len(given.full.learning_rates)
    adapter = fresh(given.setting, entrant, 0)
    rate = entrant.learning_rates[0]
    own = set(adapter.parameters())
    held = {name: one for name, one in adapter.model.named_parameters() if one not in own}
    before = {name: one.detach().clone() for name, one in held.items()}
    max(own, key=lambda one: one.numel()).data.fill_(rate)
    merge(adapter.model, "entrant")
    after = dict(adapter.model.named_parameters())
    moved = sum(float((after[name].detach() - one).square().sum()) for name, one in before.items())
    whole = given.full.learning_rates[0] ** 2 * D
    assert math.sqrt(moved) == pytest.approx(math.sqrt(whole), rel=0.1)
