"""The steps of a run as they pass: progress, trackers, the measured peak, SIGTERM (floor 7)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidepath.cli.launch import stopped_by_sigterm
from sidepath.cli.output import note, progress
from sidepath.errors import Interrupted, StoreError
from sidepath.store.aside import discard
from sidepath.store.folder import lists_all_files
from sidepath.training.loop import Training
from sidepath.training.measured import Peak, watched
from sidepath.training.processes import Processes
from sidepath.training.report import StepReport
from sidepath.training.tracking import trackers

CHECKPOINTS = ".checkpoints"
TRACKED = ".tracked"


@dataclass(frozen=True)
class Followed:
    """What passed by."""

    reports: list[StepReport]
    steps: int
    """Steps of the whole run; more than there are reports where it was resumed."""
    peak: Peak
    seconds: float

    @property
    def losses(self) -> dict[str, float | None]:
        """The first and the last step's."""
        if not self.reports:
            return {"first": None, "last": None}
        return {"first": self.reports[0].loss, "last": self.reports[-1].loss}


def follow(
    training: Training,
    output: Path,
    processes: Processes,
    tracked_by: tuple[str, ...],
    settings: Mapping[str, Any],
) -> Followed:
    """Take every step of a run.

    Errors: `Interrupted` after a SIGTERM, once the checkpoint is written.
    """
    began = time.perf_counter()
    reports: list[StepReport] = []
    peak = Peak()
    # Counting tensors on a CPU costs time, and has not been tried on sharded ones.
    steps: Iterable[StepReport] = training
    if processes.count == 1:
        steps = watched(training, training.model, peak, also=training.largest_step)
    folder = output.with_name(output.name + TRACKED)
    with (
        trackers(tracked_by, folder, output.name, settings) as tracking,
        stopped_by_sigterm(training.stop),
        progress("step") as advance,
    ):
        for report in steps:
            reports.append(report)
            for text in report.notices:
                note(text)
            tracking.log(_figures(report), report.number)
            advance(report.number, report.total, _facts(report))
    if training.interrupted:
        raise Interrupted(
            f"stopped after step {training.steps} of {reports[-1].total}",
            where=checkpoints_of(output),
            hint="the same command with --resume goes on from there, to the same bits",
        )
    return Followed(reports, training.steps, peak, time.perf_counter() - began)


def _figures(report: StepReport) -> dict[str, float | None]:
    return {
        "loss": report.loss,
        "learning_rate": report.learning_rate,
        "gradient_norm": report.gradient_norm,
        "tokens_per_second": report.tokens_per_second,
        "held_out/loss": None if report.held_out is None else report.held_out["loss"],
    }


def _facts(report: StepReport) -> str:
    held_out = "" if report.held_out is None else f", held out {report.held_out['loss']:.4f}"
    return f"loss {report.loss:.4f}{held_out}, {report.tokens_per_second:,.0f} tokens/s"


def require_no_leftovers(output: Path) -> None:
    """Raise a `StoreError` when an unfinished run of this output left checkpoints."""
    left = checkpoints_of(output)
    if any(left.glob("*")):
        raise StoreError(
            "an unfinished run of this output left checkpoints",
            where=left,
            hint="go on with --resume, or delete that folder",
        )


def checkpoints_of(output: Path) -> Path:
    """Where the checkpoints of an output's run lie, beside it."""
    return output.with_name(output.name + CHECKPOINTS)


def drop_checkpoints(output: Path) -> None:
    """A saved adapter needs no checkpoint any more; what else lies in their folder is left."""
    folder = checkpoints_of(output)
    for path in folder.glob("*"):
        if path.is_dir() and lists_all_files(path):
            discard(path)
    with contextlib.suppress(OSError):
        folder.rmdir()
