"""A task's intrinsic dimension: full fine-tuning, then ever fewer numbers, at equal budget.

Dimensions: D parameters of the base, d trained numbers.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sidepath.analyse.intrinsic import Intrinsic, intrinsic_dimension, spread
from sidepath.compare.contest import Contest, Progress, Standing
from sidepath.compare.entrants import Entrant
from sidepath.compare.material import material_of
from sidepath.compare.outcome import Row, rows_of
from sidepath.compare.report import write
from sidepath.compare.run import document_of
from sidepath.compare.runs import RunTable
from sidepath.compare.setting import Setting
from sidepath.compare.trial import facts_of, fresh
from sidepath.compare.workers import Workers
from sidepath.errors import ConfigError, SidepathError, TrainError, in_one_line
from sidepath.methods.intrinsic import IntrinsicDimension
from sidepath.training.evaluate import CAUSAL, CLASSIFY
from sidepath.training.metrics import LOWER_IS_BETTER

Kind = Literal["did", "said"]
LEAST, COUNT = 100, 12
"""Where no dimensions are given: the smallest, as in Aghajanyan et al. (2020), and how many."""
PART = 10
"""The largest is then the base's parameters divided by this."""


@dataclass(frozen=True)
class Search:
    """What is searched for, in what, and where the result goes."""

    setting: Setting
    full: Entrant
    """Full fine-tuning, whose score a share of is to be reached, with its learning rates."""
    output: Path
    """Folder of the run table and of the report's files, which are replaced."""
    workers: Workers
    kind: Kind
    share: float
    dimensions: tuple[int, ...] | None
    """The smallest, the largest and how many; by the base's size when None."""


def run_search(search: Search, *, progress: Progress, say: Callable[[str], None]) -> dict[str, Any]:
    """Carry out what the run table lacks; the JSON document of `sidepath compare --intrinsic`.

    That of a comparison, a row a dimension tried behind the one of full fine-tuning, and
    `intrinsic`: {d, share, full, target, kind, dimensions, trials: [{d, score, reached, low, high,
    values}]}, where `d` is None when the largest dimension falls short.

    Raises:
        ConfigError: of the metric, less is better; the dimensions are impossible for this base;
            full fine-tuning scores nothing.
        TrainError: full fine-tuning failed in a seed.
    """
    began = time.perf_counter()
    material = material_of(search.setting)
    _require_a_share_means_something(material.metric, material.train.task)
    grid = _possible(search)
    with RunTable(search.output) as table:
        before = len(table)
        contest = Contest(search.setting, [], table, search.workers, progress, say)
        found, standings = searched(contest, search, grid)
        ran = len(table) - before
    rows = rows_of(standings, material.metric, {})
    document = {
        **document_of(search.setting, standings, rows, ran=ran, began=began, output=search.output),
        "intrinsic": _described(found, rows, search, grid),
    }
    return {**document, "files": write(search.output, document)}


def searched(
    contest: Contest, search: Search, grid: Sequence[int]
) -> tuple[Intrinsic, list[Standing]]:
    """The search, and everyone who was trained for it: full fine-tuning, then by dimension.

    A dimension's score is its mean over the seeds; one that failed in a seed has none, and
    reaches nothing.
    Raises: `TrainError` where full fine-tuning failed in a seed; what `intrinsic_dimension` raises.
    """
    full = _standing(contest, search.full)
    if full.reason is not None or len(full.values) < len(contest.setting.seeds):
        failed = [one["failed"] for one in full.finals.values() if "failed" in one]
        raise TrainError(
            "full fine-tuning failed: there is no score to reach a share of",
            found=full.reason or failed[0],
        )
    at_full = _score(full, contest.setting)
    tried: dict[int, Standing] = {}

    def score(d: int) -> float:
        tried[d] = _standing(contest, inside(search, d, full.facts["trainable"]))
        value = _score(tried[d], contest.setting)
        contest.say(f"d = {d:,}: {value:.4g}, to reach {search.share * at_full:.4g}")
        return value

    found = intrinsic_dimension(score, at_full, grid, share=search.share)
    return found, [full, *(tried[d] for d in sorted(tried))]


def inside(search: Search, d: int, D: int) -> Entrant:
    """Training in d dimensions: as many learning rates as full fine-tuning, each `sqrt(D / d)`
    times as large.

    Adam moves every trained number by about the learning rate, and the projection's columns have
    length 1: a step of d numbers is then as long, among the D parameters, as one of all of them.
    """
    rates = tuple(float(f"{rate * math.sqrt(D / d):.4g}") for rate in search.full.learning_rates)
    return Entrant(f"d = {d:,}", IntrinsicDimension(d=d, kind=search.kind), rates)


def _standing(contest: Contest, entrant: Entrant) -> Standing:
    (found,) = dataclasses.replace(contest, entrants=[entrant]).tried()
    return found


def _score(standing: Standing, setting: Setting) -> float:
    values = list(standing.values.values())
    return statistics.fmean(values) if len(values) == len(setting.seeds) else math.nan


def _require_a_share_means_something(metric: str, task: str) -> None:
    if metric not in LOWER_IS_BETTER:
        return
    known = CLASSIFY if task == "classify" else CAUSAL
    raise ConfigError(
        "an intrinsic dimension is where a share of full fine-tuning's score is reached: the "
        "metric must be one of which more is better",
        found=metric,
        expected=", ".join(name for name in known if name not in LOWER_IS_BETTER),
        hint="choose one with --metric",
    )


def _possible(search: Search) -> tuple[int, ...]:
    """The dimensions to search in; the ends are tried on the base before anything is trained."""
    D = facts_of(fresh(search.setting, search.full, 0))["trainable"]
    low, high, count = search.dimensions or (LEAST, max(2 * LEAST, D // PART), COUNT)
    grid = spread(low, high, count)
    faults = []
    for d in (grid[0], grid[-1]):
        try:
            fresh(search.setting, inside(search, d, D), 0)
        except SidepathError as error:
            faults.append(f"d = {d}: {in_one_line(error)}")
        gc.collect()  # the base that was tried on is one big cycle
    if faults:
        raise ConfigError("this base cannot be trained in these dimensions", faults=faults)
    return grid


def _described(
    found: Intrinsic, rows: Sequence[Row], search: Search, grid: Sequence[int]
) -> dict[str, Any]:
    """The result as plain values, each trial with its spread over the seeds."""
    plain = found.as_dict()
    metrics: Mapping[int, Any] = {
        row["settings"]["d"]: row["metric"] for row in rows if row["kind"] == "intrinsic"
    }
    nothing: dict[str, Any] = {"low": None, "high": None, "values": []}
    for trial in plain["trials"]:
        metric = metrics.get(trial["d"], nothing)
        trial.update({name: metric[name] for name in nothing})
    return {**plain, "kind": search.kind, "dimensions": list(grid)}
