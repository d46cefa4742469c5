"""Several adapters trained at once over one base: one forward pass for the rows of all.

Dimensions: B rows of all runs, T tokens of the longest, N targets.

Each run keeps its own data, order, optimiser and schedule. What they share is the base's
product: their rows stand in one batch, each row is answered by its own adapter (see
`core.routing`), and each run's loss is that of its own rows, so that every adapter gets the
gradient it would get by itself.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidepath.config import TrainConfig
from sidepath.data.dataset import Data
from sidepath.data.rng import derived
from sidepath.errors import TrainError
from sidepath.injection.surgery import route
from sidepath.training import state
from sidepath.training.batching import IGNORED, Batch
from sidepath.training.loss import cross_entropy, logits_and_targets
from sidepath.training.processes import Processes
from sidepath.training.report import StepReport
from sidepath.training.run import Run, Step
from sidepath.training.trained import opened, require_fit, trained_of

SHARED = ("autocast", "gradient_checkpointing", "kernels")
"""Settings of the one forward pass, which all runs must have in common."""


def train_together(
    model: nn.Module,
    runs: Mapping[str, tuple[Data, TrainConfig]],
    *,
    checkpoints: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> Generator[dict[str, StepReport]]:
    """Train the adapters named, each on its own data with its own config, in place.

    Yields, after each joint step, a `StepReport` of every run that took part; a run that is
    done leaves the others to go on. Without dropout each adapter becomes what it would have
    become alone, up to rounding. With `checkpoints` each run has a folder of its own there.

    Raises:
        TrainError: settings that the one forward pass cannot have for all; packed rows; and
            everything that `train` raises.
    """
    processes = Processes.of_this_run()
    made = {}
    for name, (data, config) in runs.items():
        data.require_trainable()
        require_fit(model, data)
        folder = None if checkpoints is None else Path(checkpoints) / name
        made[name] = Run(trained_of(model, name), data, None, config, folder, processes)
    _require_alike(made, resume)
    for run in made.values():
        state.begin(run, resume=resume)
    return _reports(model, made)


def _require_alike(runs: Mapping[str, Run], resume: bool) -> None:
    faults = []
    for field in SHARED:
        values = {name: getattr(run.config, field) for name, run in runs.items()}
        if len(set(values.values())) > 1:
            faults.append(f"{field} differs: {values}")
    for name, run in runs.items():
        if run.config.packing:
            faults.append(f'"{name}": packed rows cannot be routed')
        if run.config.eval_every or run.config.eval_share or run.config.patience:
            faults.append(f'"{name}": held-out rows are not measured here; evaluate afterwards')
        if run.config.watch:
            faults.append(f'"{name}": watch is for a run of its own: no history is handed out here')
        if run.config.checkpoint_every and run.folder is None:
            faults.append(f'"{name}": checkpoint_every needs a folder for checkpoints')
        if resume and run.folder is None:
            faults.append(f'"{name}": resume needs a folder with checkpoints')
    if len({run.data.task for run in runs.values()}) > 1:
        faults.append("causal and labelled rows need models of different kinds")
    if not runs:
        faults.append("no adapter is named")
    if faults:
        raise TrainError("these adapters cannot be trained together", faults=faults)


def _reports(model: nn.Module, runs: Mapping[str, Run]) -> Generator[dict[str, StepReport]]:
    shared = next(iter(runs.values())).config
    trained = [run.trained for run in runs.values()]
    with contextlib.ExitStack() as stack:
        stack.enter_context(opened(trained, shared))
        for run in runs.values():
            run.processes.require_equal("the trained tensors", run.trained.tensors)
        feeds = {
            name: stack.enter_context(contextlib.closing(run.batches()))
            for name, run in runs.items()
        }
        while going := {name: run for name, run in runs.items() if not run.over()}:
            steps = {name: run.open_step(next(feeds[name])) for name, run in going.items()}
            losses = _backward(model, going, steps)
            yield {
                name: run.finished(run.close_step(steps[name], losses[name]))
                for name, run in going.items()
            }


def _backward(
    model: nn.Module, runs: Mapping[str, Run], steps: Mapping[str, Step]
) -> dict[str, list[Tensor]]:
    """Add every run's gradients to its parameters; each run's losses, one a forward pass."""
    losses: dict[str, list[Tensor]] = {name: [] for name in runs}
    first = next(iter(runs.values()))
    place = (first.config.seed, first.step, first.processes.rank)
    with derived(*place, device=first.device):
        for number in range(max(len(step.batches) for step in steps.values())):
            present = {name: step for name, step in steps.items() if number < len(step.batches)}
            batches = [step.batches[number] for step in present.values()]
            names = [
                name
                for name, batch in zip(present, batches, strict=True)
                for _ in range(len(batch.ids_BT))
            ]
            with route(model, names):
                found = _losses(model, runs, present, batches)
                torch.stack(found).sum().backward()  # type: ignore[no-untyped-call]
            for name, loss in zip(present, found, strict=True):
                losses[name].append(loss.detach())
    return losses


def _losses(
    model: nn.Module, runs: Mapping[str, Run], steps: Mapping[str, Step], batches: list[Batch]
) -> list[Tensor]:
    first = next(iter(runs.values()))
    joined = join(batches, first.data.pad_id).to(first.device)
    with first.autocast():
        logits, targets = logits_and_targets(model, joined)
        sizes = [
            len(batch.ids_BT) if batch.labels_B is not None else _targets(batch)
            for batch in batches
        ]
        parts = zip(torch.split(logits, sizes), torch.split(targets, sizes), strict=True)
        found = []
        for (name, step), batch, (part, wanted) in zip(steps.items(), batches, parts, strict=True):
            total = cross_entropy(part, wanted, runs[name].config.label_smoothing)
            found.append(step.share(batch, total))
    return found


def _targets(batch: Batch) -> int:
    return int((batch.targets_BT[:, 1:] != IGNORED).sum())


def join(batches: Sequence[Batch], pad_id: int) -> Batch:
    """One batch with the rows of all, padded on the right to the longest."""
    longest = max(batch.ids_BT.shape[1] for batch in batches)

    def padded(tensors: list[Tensor], value: int) -> Tensor:
        return torch.cat([F.pad(t, (0, longest - t.shape[1]), value=value) for t in tensors])

    labels = [batch.labels_B for batch in batches if batch.labels_B is not None]
    masks = [mask for batch in batches if (mask := batch.attention_mask_BT) is not None]
    return Batch(
        padded([batch.ids_BT for batch in batches], pad_id),
        padded(masks, 0),
        None,
        padded([batch.targets_BT for batch in batches], IGNORED),
        torch.cat(labels) if labels else None,
        tuple(row for batch in batches for row in batch.rows),
        sum(batch.tokens for batch in batches),
        sum(batch.weight for batch in batches),
    )
