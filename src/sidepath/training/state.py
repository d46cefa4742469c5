"""Where a run stands: what a checkpoint holds of it, and how it is taken up again.

There is no random state: see `rng`. With several processes the first one writes, since all of
them hold the same tensors, and every one reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sidepath import config as settings
from sidepath.config import TrainConfig
from sidepath.data.dataset import Data
from sidepath.errors import ResumeError
from sidepath.store.fingerprint import fingerprint
from sidepath.training import checkpoint as checkpoints
from sidepath.training.best import Best
from sidepath.training.checkpoint import Checkpoint
from sidepath.training.optim import restore_state, state_tensors
from sidepath.training.order import Order
from sidepath.training.processes import Processes
from sidepath.training.trained import Trained, device_of
from sidepath.training.watch import Watch


@dataclass
class Resumable:
    """Where a run stands, and what it is a run of: what its checkpoints are made from."""

    trained: Trained
    data: Data
    held_out: Data | None
    config: TrainConfig
    folder: Path | None
    """Where checkpoints lie."""
    processes: Processes
    order: Order
    optimizer: torch.optim.Optimizer
    watch: Watch
    step: int = 0
    """Steps done."""
    best: Best = field(default_factory=Best)
    stopped: bool = False
    """Early, for want of improvement."""
    notices: list[str] = field(default_factory=list)
    """What the next report tells the user."""


def save(run: Resumable) -> Path:
    """Write a checkpoint of the run as it stands; its path. In every process or in none.

    Errors: `WriteFailed`; `TrainError` when the processes do not hold the same tensors.
    """
    assert run.folder is not None
    run.processes.require_equal("the trained tensors", run.trained.tensors)
    identity = identity_of(run)
    if run.processes.first:
        checkpoint = Checkpoint(run.step, _tensors(run), _progress(run), identity)
        checkpoints.save(run.folder, checkpoint, keep=run.config.keep_checkpoints)
    run.processes.wait()
    return checkpoints.path_of(run.folder, run.step)


def _tensors(run: Resumable) -> dict[str, Any]:
    tensors = {f"model/{name}": tensor for name, tensor in run.trained.tensors.items()}
    tensors |= state_tensors(run.optimizer, run.trained.parameters)
    tensors |= {f"best/{name}": tensor for name, tensor in run.best.state.items()}
    return tensors | {f"watch/{name}": tensor for name, tensor in run.watch.tensors().items()}


def _progress(run: Resumable) -> dict[str, Any]:
    epoch, position = run.order.place(run.step)
    return {
        "best": run.best.as_dict(),
        "stopped": run.stopped,
        "epoch": epoch,
        "position": position,
        "processes": run.processes.count,
    }


def begin(run: Resumable, *, resume: bool) -> None:
    """Look into the folder for checkpoints, where there is one, before the first step. In place.

    With `resume` the newest whole checkpoint is taken up; without any, the run starts at step 1.

    Errors: `ResumeError` when none can be trusted, or it belongs to a run with other settings,
    data, adapter or base; without `resume`, when there are checkpoints.
    """
    if run.folder is not None and resume:
        _resume(run, run.folder)
    elif run.folder is not None:
        checkpoints.require_none(run.folder)


def _resume(run: Resumable, folder: Path) -> None:
    found, run.notices = checkpoints.latest(folder)
    seen = run.processes.all_of([-1 if found is None else found.step])
    if len(set(seen)) > 1:
        raise ResumeError(
            "the processes do not find the same newest checkpoint",
            where=folder,
            found=", ".join(f"step {step}" if step >= 0 else "none" for step in seen),
            hint="all of them must see one folder",
        )
    if found is None:
        run.notices.append(f"no checkpoint in {folder}: started from the beginning")
        return
    checkpoints.require_same(found.identity, identity_of(run), folder)
    try:
        _take_up(run, found)
        before = int(found.progress["processes"])
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ResumeError("the checkpoint is malformed", where=folder, found=repr(error)) from error
    if run.processes.first:
        # The kill may have come between a save and its pruning, and no later save may follow.
        checkpoints.prune(folder, run.step, keep=run.config.keep_checkpoints)
    run.notices.append(f"resumed after step {run.step}")
    if before != run.processes.count:
        run.notices.append(
            f"the checkpoint is of a run in {before} processes, this one has "
            f"{run.processes.count}: it will agree within rounding, not to the bit"
        )


def _take_up(run: Resumable, found: Checkpoint) -> None:
    run.stopped, run.step = bool(found.progress["stopped"]), found.step
    kept = checkpoints.under(found.tensors, "best/")
    device = device_of(run.trained.model)
    on_device = {name: tensor.to(device) for name, tensor in kept.items()}
    run.best = Best.from_dict(found.progress["best"], on_device)
    run.watch.take(checkpoints.under(found.tensors, "watch/"))
    restore_state(run.optimizer, run.trained.parameters, found.tensors)
    run.trained.put(checkpoints.under(found.tensors, "model/"))


def identity_of(run: Resumable) -> dict[str, Any]:
    """What a run that resumes this one must have in common with it."""
    installed = run.trained.adapter
    return {
        "config": settings.as_dict(run.config),
        "data": run.data.identity,
        "held_out": None if run.held_out is None else run.held_out.identity,
        "method": None if installed is None else type(installed.config).__name__,
        "adapter": None if installed is None else settings.as_dict(installed.config),
        "tensors": {
            name: f"{tensor.dtype} {list(tensor.shape)}"
            for name, tensor in run.trained.tensors.items()
        },
        "base": None if installed is None else fingerprint(run.trained.model).id,
    }
