"""A comparison, straight through: trials, latency, the document and its files."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidepath.bench.setting import machine
from sidepath.compare.contest import Contest, Progress, Standing
from sidepath.compare.entrants import Entrant
from sidepath.compare.latency import Latency, Shape, latencies
from sidepath.compare.material import Material, material_of
from sidepath.compare.outcome import Row, excluded, row_of, rows_of
from sidepath.compare.report import write
from sidepath.compare.runs import RunTable
from sidepath.compare.setting import Setting, code_version
from sidepath.compare.workers import Workers
from sidepath.config import as_dict
from sidepath.errors import SidepathError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Comparison:
    """What is compared, and where the result goes."""

    setting: Setting
    entrants: Sequence[Entrant]
    output: Path
    """Folder of the run table and of the report's files, which are replaced."""
    workers: Workers
    shapes: Sequence[Shape]
    """Batches that latency is measured at; none: not measured."""
    rounds: int
    """Forward passes of each kind that latency is taken from."""
    train: bool = True
    """False: only latency is measured."""


def run_comparison(comparison: Comparison, *, progress: Progress, say: Say) -> dict[str, Any]:
    """Carry out what the run table lacks; the JSON document of `sidepath compare`.

    Raises what `Contest.run` raises.
    """
    began = time.perf_counter()
    setting = comparison.setting
    material = material_of(setting)
    with RunTable(comparison.output) as table:
        before = len(table)
        contest = Contest(setting, comparison.entrants, table, comparison.workers, progress, say)
        standings = contest.run() if comparison.train else contest.admitted()
        ran = len(table) - before
    measured = _latencies(comparison, standings, progress, say)
    rows = (
        rows_of(standings, material.metric, measured)
        if comparison.train
        else [
            row_of(one, material.metric, measured.get(one.entrant.label, ()))
            for one in standings
            if one.reason is None
        ]
    )
    document = document_of(setting, standings, rows, ran=ran, began=began, output=comparison.output)
    return {**document, "files": write(comparison.output, document)}


def document_of(
    setting: Setting,
    standings: Sequence[Standing],
    rows: Sequence[Row],
    *,
    ran: int,
    began: float,
    output: Path,
) -> dict[str, Any]:
    """The rows, and everything that has to be known of how they came to be.

    `ran` counts the trials that were not in the run table; `began` is `perf_counter`'s time.
    """
    material = material_of(setting)
    return {
        "rows": list(rows),
        "excluded": excluded(standings),
        "metric": material.metric,
        "higher_is_better": material.higher_is_better,
        "data": {"name": setting.data, **_data(material)},
        "base": setting.bases.identity(),
        "seeds": list(setting.seeds),
        "train": as_dict(setting.train),
        "trials": {"ran": ran, "total": sum(len(s.sweep) + len(s.finals) for s in standings)},
        "machine": machine(),
        "code": code_version(),
        "seconds": time.perf_counter() - began,
        "output": str(output),
    }


def _latencies(
    comparison: Comparison, standings: Sequence[Standing], progress: Progress, say: Say
) -> dict[str, list[Latency]]:
    found: dict[str, list[Latency]] = {}
    able = [standing.entrant for standing in standings if standing.reason is None]
    if not comparison.shapes:
        return found
    with progress("latency") as advance:
        for done, entrant in enumerate(able, start=1):
            try:
                found[entrant.label] = latencies(
                    comparison.setting, entrant, comparison.shapes, rounds=comparison.rounds
                )
            except SidepathError as error:
                say(f"{entrant.label}: latency could not be measured: {error.what}")
            gc.collect()  # two bases that are cycles
            advance(done, len(able), entrant.label)
    return found


def _data(material: Material) -> dict[str, Any]:
    return {
        "task": material.train.task,
        "train": len(material.train),
        "validation": len(material.validation),
        "test": len(material.test),
        "digests": material.identity(),
        "audit": material.train.audit.as_dict(),
    }
