"""One training run: what it trains, where it stands, and how it takes a step."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidepath import config as settings
from sidepath.config import TrainConfig
from sidepath.errors import NonFinite, ResumeError
from sidepath.store.fingerprint import fingerprint
from sidepath.training import checkpoint as checkpoints
from sidepath.training.batching import Batch, collate, split_step, step_groups
from sidepath.training.best import Best
from sidepath.training.checkpoint import Checkpoint
from sidepath.training.data import Data
from sidepath.training.evaluate import measure
from sidepath.training.loss import batch_loss
from sidepath.training.optim import (
    clip_gradients,
    gradient_norm,
    learning_rate,
    make_optimizer,
    set_learning_rate,
)
from sidepath.training.report import StepReport
from sidepath.training.rng import derived
from sidepath.training.trained import Trained, device_of, opened

DEFAULT_EPOCHS = 3.0
"""Passes over the rows when the config gives neither steps nor epochs."""


class Run:
    """The state of one run; `reports` moves it on."""

    def __init__(
        self,
        trained: Trained,
        data: Data,
        held_out: Data | None,
        config: TrainConfig,
        folder: Path | None,
    ) -> None:
        self.trained, self.data, self.held_out = trained, data, held_out
        self.config, self.folder = config, folder
        self.device = device_of(trained.model)
        self.optimizer = make_optimizer(trained.parameters, config)
        self.rows_a_step = config.batch_size * config.accumulate
        self.steps_an_epoch = math.ceil(len(data) / self.rows_a_step)
        self.total = self._total()
        self.step = 0
        self.best = Best()
        self.stopped = False
        self.probed = False
        self.notices: list[str] = []
        self._order: tuple[int, list[list[int]]] = (-1, [])

    def _total(self) -> int:
        steps, epochs = self.config.steps, self.config.epochs
        if steps is None and epochs is None:
            epochs = DEFAULT_EPOCHS
        by_epochs = math.inf if epochs is None else math.ceil(epochs * self.steps_an_epoch)
        return int(min(by_epochs, math.inf if steps is None else steps))

    def reports(self) -> Iterator[StepReport]:
        """Steps until the end or an early stop."""
        checkpointing = self.config.gradient_checkpointing
        with opened(self.trained, gradient_checkpointing=checkpointing):
            if self._over():
                self._restore_best()
            while not self._over():
                yield self._finished(self._take_step())

    def _over(self) -> bool:
        return self.stopped or self.step >= self.total

    def _take_step(self) -> StepReport:
        started = time.perf_counter()
        rate = learning_rate(self.config, self.step + 1, self.total)
        set_learning_rate(self.optimizer, rate)
        self.trained.model.train()
        batches = [
            collate(self.data.examples, rows, self.data.pad_id)
            for rows in split_step(self._rows(), self.config.batch_size)
        ]
        weight = sum(batch.weight for batch in batches)
        with derived(self.config.seed, self.step, device=self.device):
            losses = [self._backward(batch, weight) for batch in batches]
        parameters = list(self.trained.parameters.values())
        norm = gradient_norm(parameters)
        values = torch.stack(losses).tolist()
        size = float(norm)
        self._require_finite(batches, values, size)
        if not self.probed:
            self.trained.require_gradients()
            self.probed = True
        clip_gradients(parameters, self.config.clip, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        seconds = time.perf_counter() - started
        tokens = sum(batch.tokens for batch in batches)
        return StepReport(
            number=self.step,
            total=self.total,
            epoch=self.step / self.steps_an_epoch,
            loss=math.fsum(values),
            tokens=tokens,
            tokens_per_second=tokens / seconds,
            learning_rate=rate,
            gradient_norm=size,
            seconds=seconds,
        )

    def _rows(self) -> list[int]:
        epoch, at = divmod(self.step, self.steps_an_epoch)
        if self._order[0] != epoch:
            lengths, seed = self.data.lengths, self.config.seed
            groups = step_groups(lengths, self.rows_a_step, seed=seed, epoch=epoch)
            self._order = (epoch, groups)
        return self._order[1][at]

    def _backward(self, batch: Batch, weight: int) -> Tensor:
        enabled = self.config.autocast == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled):
            smoothing = self.config.label_smoothing
            total = batch_loss(self.trained.model, batch.to(self.device), smoothing=smoothing)
        loss = total / weight
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _require_finite(self, batches: list[Batch], losses: list[float], norm: float) -> None:
        if math.isfinite(norm) and all(map(math.isfinite, losses)):
            return
        wrong = [
            batch for batch, loss in zip(batches, losses, strict=True) if not math.isfinite(loss)
        ]
        self.optimizer.zero_grad(set_to_none=True)
        lines = [self.data.examples[row].line for batch in wrong or batches for row in batch.rows]
        raise NonFinite(
            f"step {self.step + 1}: the {'loss' if wrong else 'gradient'} is not finite",
            where=f"{self.data.name}, {self.data.unit}s {', '.join(map(str, sorted(lines)))}",
            found=f"losses {losses}, gradient norm {norm}",
            hint="the weights were not touched; lower the learning rate, or look at these rows",
        )

    def _finished(self, report: StepReport) -> StepReport:
        """The report with what follows a step: evaluation, checkpoint, the best state."""
        measured, improved = None, False
        if self.held_out is not None and self._evaluation_due():
            batch_size = 2 * self.config.batch_size
            measured = measure(self.trained.model, self.held_out, batch_size=batch_size)
            improved = self.best.offer(measured["loss"], self.step, self.trained)
            self._stop_if_stale()
        path = self._save() if self._checkpoint_due() else None
        if self._over():
            self._restore_best()
        notices, self.notices = tuple(self.notices), []
        return dataclasses.replace(
            report, held_out=measured, best=improved, checkpoint=path, notices=notices
        )

    def _evaluation_due(self) -> bool:
        every = self.config.eval_every
        return self._over() or (every > 0 and self.step % every == 0)

    def _stop_if_stale(self) -> None:
        if self.config.patience and self.best.stale >= self.config.patience:
            self.stopped = True
            self.notices.append(
                f"stopped early after step {self.step}: "
                f"{self.best.stale} evaluations without improvement"
            )

    def _restore_best(self) -> None:
        said = self.best.put_back(self.trained, self.step)
        if said is not None:
            self.notices.append(said)

    def _checkpoint_due(self) -> bool:
        every = self.config.checkpoint_every
        return every > 0 and (self.step % every == 0 or self._over())

    def _save(self) -> Path:
        assert self.folder is not None
        tensors = {f"model/{name}": tensor for name, tensor in self.trained.tensors.items()}
        tensors |= checkpoints.optimizer_tensors(self.optimizer, self.trained.parameters)
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.state.items()}
        progress = {
            "best": self.best.as_dict(),
            "stopped": self.stopped,
            "epoch": self.step // self.steps_an_epoch,
            "position": self.step % self.steps_an_epoch,
        }
        state = Checkpoint(self.step, tensors, progress, self._identity)
        return checkpoints.save(self.folder, state, keep=self.config.keep_checkpoints)

    def resume(self) -> None:
        """Take up the newest whole checkpoint of the folder; without any, start at step 1."""
        assert self.folder is not None
        found, self.notices = checkpoints.latest(self.folder)
        if found is None:
            self.notices.append(f"no checkpoint in {self.folder}: started from the beginning")
            return
        checkpoints.require_same(found.identity, self._identity, self.folder)
        try:
            self._take_up(found)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ResumeError(
                "the checkpoint is malformed", where=self.folder, found=repr(error)
            ) from error
        self.notices.append(f"resumed after step {self.step}")

    def _take_up(self, found: Checkpoint) -> None:
        self.stopped, self.step = bool(found.progress["stopped"]), found.step
        state = checkpoints.under(found.tensors, "best/")
        on_device = {name: tensor.to(self.device) for name, tensor in state.items()}
        self.best = Best.from_dict(found.progress["best"], on_device)
        checkpoints.restore_optimizer(self.optimizer, self.trained.parameters, found.tensors)
        self.trained.put(checkpoints.under(found.tensors, "model/"))

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        """What a run that resumes this one must have in common with it."""
        installed = self.trained.adapter
        return {
            "config": settings.as_dict(self.config),
            "data": self.data.digest,
            "held_out": None if self.held_out is None else self.held_out.digest,
            "method": None if installed is None else type(installed.config).__name__,
            "adapter": None if installed is None else settings.as_dict(installed.config),
            "tensors": {
                name: f"{tensor.dtype} {list(tensor.shape)}"
                for name, tensor in self.trained.tensors.items()
            },
            "base": None if installed is None else fingerprint(self.trained.model).id,
        }
