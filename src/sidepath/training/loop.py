"""The training loop: an iterator that yields after each step.

Logging, plotting and stopping are the caller's `for`. The model's modes, `requires_grad` flags
and active adapter are put back when the loop ends, also when the caller breaks out of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from sidepath.config import TrainConfig
from sidepath.data.dataset import Data
from sidepath.errors import TrainError
from sidepath.training import state
from sidepath.training.history import History
from sidepath.training.processes import Processes
from sidepath.training.report import StepReport
from sidepath.training.run import Run
from sidepath.training.trained import require_fit, trained_of

__all__ = ["StepReport", "Training", "train"]


def train(
    model: nn.Module,
    data: Data,
    config: TrainConfig | None = None,
    *,
    adapter: str | None = None,
    held_out: Data | None = None,
    checkpoints: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> Training:
    """Train in place, yielding a `StepReport` after each optimiser step; see also `Training`.

    Trained is the adapter named, else the active one; without adapters, every parameter that
    requires a gradient. Everything else stays as it is, other adapters too.

    A step's loss is the sum over its targets by their number over all of its forward passes:
    accumulation changes neither loss nor gradient. With `held_out` rows (or `config.eval_share`)
    the state with the lowest held-out loss is back when the last report is yielded. With
    `checkpoints` and `config.checkpoint_every` a run can be resumed; on a CPU it then ends with the
    unbroken run's bits. All checks are made before this returns; the model is touched from the
    first step on.

    Raises:
        DataError: the audit refuses the data, or they do not fit the model.
        TrainError: settings that do not fit together; deltas that get no gradient (first step).
        NonFinite: NaN or Inf in loss or gradient, before the weights are touched.
        ResumeError: checkpoints that are damaged or belong to another run.
        WriteFailed: a checkpoint could not be written.
    """
    config = config or TrainConfig()
    trained = trained_of(model, adapter)
    data.require_trainable()
    if held_out is None and config.eval_share > 0:
        data, held_out = data.split(config.eval_share, seed=config.seed)
    folder = None if checkpoints is None else Path(checkpoints)
    _require_consistent(config, data, held_out, folder, resume)
    _require_fit(model, data, held_out)
    run = Run(trained, data, held_out, config, folder, Processes.of_this_run())
    state.begin(run, resume=resume)
    return Training(run)


def probe(
    model: nn.Module, data: Data, config: TrainConfig | None = None, *, adapter: str | None = None
) -> StepReport:
    """The first step's loss and gradients, as `train` would find them; nothing is changed.

    Errors: what the first step of `train` would raise: `NonFinite`, or a `TrainError` that names
    every side path without a gradient.
    """
    config = config or TrainConfig()
    data.require_trainable()
    require_fit(model, data)
    run = Run(trained_of(model, adapter), data, None, config, None, Processes.of_this_run())
    return run.probe()


class Training(Iterator[StepReport]):
    """A run under way: iterate over it for its steps.

    Where nothing in the model's body is trained (`LinearProbe`), its dropout is off and each row
    goes through it once in the run, if that can be (`training/features.py`): a notice says so.

    Where torch.distributed was started (torchrun), every process trains the same model on the
    same data with the same config, and the rows of each step are dealt out among them: the number
    of processes changes neither the steps nor, within rounding, the result.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._reports = run.reports()

    def __next__(self) -> StepReport:
        return next(self._reports)

    @property
    def model(self) -> nn.Module:
        """The model in training."""
        return self._run.trained.model

    @property
    def largest_step(self) -> int:
        """Which of the steps to come (from 0) has the longest row: the one that memory is for."""
        return self._run.largest_step()

    @property
    def steps(self) -> int:
        """Steps the run has behind it, those before it was resumed included."""
        return self._run.step

    @property
    def feature_seconds(self) -> float:
        """Seconds of the steps so far in which rows went through a frozen body to have their
        features kept: that is done once, however many steps follow.
        """
        return self._run.features.seconds

    @property
    def history(self) -> History | None:
        """What was watched so far, the steps before a resume included; None where
        `config.watch` is 0. Saved by `adapter.save(folder, files={FILE: history.as_json()})`
        (`training/history.py`).
        """
        return self._run.watch.history() if self._run.watch.every else None

    @property
    def interrupted(self) -> bool:
        """Whether the run ended by `stop` before its last step."""
        return self._run.interrupted

    def stop(self) -> None:
        """End after the step under way, with a checkpoint where there is a folder for them.

        May be called from a signal handler. In a run of several processes one call is enough.
        """
        self._run.asked_to_stop = True

    def close(self) -> None:
        """End at once, without a checkpoint; the model's modes and flags are put back."""
        self._reports.close()


def _require_fit(model: nn.Module, data: Data, held_out: Data | None) -> None:
    require_fit(model, data)
    if held_out is None:
        return
    require_fit(model, held_out)
    if (held_out.task, held_out.labels) != (data.task, data.labels):
        raise TrainError(
            "the held-out rows are of another task or have other labels",
            found=f"{held_out.task} {held_out.labels}",
            expected=f"{data.task} {data.labels}",
            hint="load_data(..., labels=data.labels)",
        )


def _require_consistent(
    config: TrainConfig, data: Data, held_out: Data | None, folder: Path | None, resume: bool
) -> None:
    rules = {
        "packing needs rows of known length, and a transform may change them": (
            data.transform is None or not config.packing
        ),
        "patience needs eval_every": config.patience == 0 or config.eval_every > 0,
        "eval_every and patience need held-out rows (held_out, or eval_share)": (
            held_out is not None or config.eval_every == config.patience == 0
        ),
        "checkpoint_every needs a folder for checkpoints": (
            folder is not None or config.checkpoint_every == 0
        ),
        "resume needs a folder with checkpoints": folder is not None or not resume,
    }
    faults = [rule for rule, holds in rules.items() if not holds]
    if faults:
        raise TrainError("settings do not fit together", faults=faults)
