"""One training run: what it trains, where it stands, and how it takes a step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sidepath.config import TrainConfig
from sidepath.data.dataset import Data
from sidepath.data.rng import derived
from sidepath.errors import NonFinite
from sidepath.training import state
from sidepath.training.batching import Batch
from sidepath.training.evaluate import measure
from sidepath.training.features import Features, Trainable, features_of
from sidepath.training.feed import Feed, order_of
from sidepath.training.loss import batch_loss
from sidepath.training.optim import (
    clip_gradients,
    gradient_norm,
    learning_rate,
    make_optimizer,
    set_learning_rate,
)
from sidepath.training.packing import require_packable
from sidepath.training.processes import Processes
from sidepath.training.report import StepReport
from sidepath.training.trained import Trained, device_of, opened
from sidepath.training.watch import Watch

DEFAULT_EPOCHS = 3.0
"""Passes over the rows when the config gives neither steps nor epochs."""
NAMED_ROWS = 20
"""Rows that an error names one by one."""


@dataclass(frozen=True, eq=False)
class Step:
    """One optimiser step under way, in this process."""

    batches: list[Batch]
    weight: float
    """What the step's loss is divided by: targets (or rows) of all processes."""
    tokens: int
    """Tokens of all processes."""
    rate: float
    started: float

    def share(self, batch: Batch, total: Tensor) -> Tensor:
        """What a batch with this summed loss adds to the step's loss. An idle pass takes part
        with nothing: its weight is 0, and so is its gradient.
        """
        return total / self.weight if batch.weight else total * 0.0


class Run(state.Resumable):
    """The state of one run; `reports` moves it on."""

    def __init__(
        self,
        trained: Trained,
        data: Data,
        held_out: Data | None,
        config: TrainConfig,
        folder: Path | None,
        processes: Processes,
    ) -> None:
        order = order_of(data, config)
        optimizer = make_optimizer(trained.parameters, config, trained.rates)
        watch = Watch(trained, config.watch)
        super().__init__(
            trained, data, held_out, config, folder, processes, order, optimizer, watch
        )
        self.device = device_of(trained.model)
        size, seed = config.batch_size, config.seed
        self.feed = Feed(data, order, size, seed, processes.rank, processes.count)
        self.total = self._total()
        self.asked_to_stop = False
        """This process was, perhaps by a signal in the middle of a step."""
        self.interrupted = False
        """Stopped by request, to be resumed."""
        self.probed = False
        self.features: Features = Trainable()

    def _total(self) -> int:
        steps, epochs = self.config.steps, self.config.epochs
        if steps is None and epochs is None:
            epochs = DEFAULT_EPOCHS
        by_epochs = math.inf if epochs is None else self.order.steps_of(epochs)
        return int(min(by_epochs, math.inf if steps is None else steps))

    def reports(self) -> Generator[StepReport]:
        """Steps until the end, an early stop, or a request to stop."""
        with self.prepared() as steps:
            if self.over():
                self._restore_best()
            while not self.over():
                step = self.open_step(next(steps))
                yield self.finished(self.close_step(step, self.backward(step)))

    def largest_step(self) -> int:
        """Which of the steps to come (from 0), within an epoch, has the longest row."""
        last = min(self.total, self.step + self.order.start_of(1))
        return self.order.largest(self.step, last) - self.step

    @contextlib.contextmanager
    def prepared(self) -> Iterator[Iterator[list[Batch]]]:
        """Open the model for training and give the batches of each step to come."""
        with opened([self.trained], self.config):
            if self.order.capacity is not None:
                require_packable(self.trained.model, self.data)
            self.processes.require_equal("the trained tensors", self.trained.tensors)
            again = self.total > self.order.start_of(1)
            with self.autocast():
                self.features = features_of(self.trained, self.data, self.config, again=again)
            if self.features.notice is not None:
                self.notices.append(self.features.notice)
            with contextlib.closing(self.features), contextlib.closing(self.batches()) as steps:
                yield steps

    def batches(self) -> Generator[list[Batch]]:
        """The batches of each step to come."""
        return self.feed.steps(self.step, self.total, self.config.workers)

    def over(self) -> bool:
        """Whether no step is left to take."""
        return self.stopped or self.interrupted or self.step >= self.total

    def open_step(self, batches: list[Batch]) -> Step:
        """Begin a step: its weight over all processes, and the learning rate it uses."""
        started = time.perf_counter()
        weight, tokens = self.processes.total(
            [sum(batch.weight for batch in batches), sum(batch.tokens for batch in batches)]
        )
        rate = learning_rate(self.config, self.step + 1, self.total)
        set_learning_rate(self.optimizer, rate)
        if not self.trained.model.training:  # the caller may have measured something in between
            self.trained.model.train()
        return Step(batches, weight, int(tokens), rate, started)

    def backward(self, step: Step) -> list[Tensor]:
        """Add the step's gradients to the parameters; each batch's share of the loss."""
        with derived(self.config.seed, self.step, self.processes.rank, device=self.device):
            return [self._backward(step, batch) for batch in step.batches]

    def _backward(self, step: Step, batch: Batch) -> Tensor:
        batch = batch.to(self.device)
        with self.autocast(), self.features.answering(batch):
            total = batch_loss(self.trained.model, batch, smoothing=self.config.label_smoothing)
        loss = step.share(batch, total)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def autocast(self) -> torch.autocast:
        """The dtype that forward passes run in."""
        enabled = self.config.autocast == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def close_step(self, step: Step, losses: Sequence[Tensor]) -> StepReport:
        """Check the gradients and move the parameters; the weights stand until all is well."""
        parameters = list(self.trained.parameters.values())
        loss, norm = self._checked(step, losses)
        self.watch.see_gradients(self.step + 1)
        clip_gradients(parameters, self.config.clip, norm)
        self.trained.penalise()  # behind the checks of what the data gave, and not clipped
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.watch.see_step(self.step, loss)
        return self._report(step, self.step, loss, float(norm))

    def probe(self) -> StepReport:
        """The report that the next step would give; nothing is moved."""
        with self.prepared() as steps:
            step = self.open_step(next(steps))
            loss, norm = self._checked(step, self.backward(step))
            self.optimizer.zero_grad(set_to_none=True)
            return self._report(step, self.step + 1, loss, float(norm))

    def _checked(self, step: Step, losses: Sequence[Tensor]) -> tuple[float, Tensor]:
        """The step's loss and gradient norm over all processes, once both are known to be well."""
        parameters = list(self.trained.parameters.values())
        self.processes.add_gradients(parameters)
        norm = gradient_norm(parameters)
        values = torch.stack(list(losses)).tolist()
        loss = self.processes.total([math.fsum(values)])[0]
        self._require_finite(step.batches, values, loss, float(norm))
        if not self.probed:
            self.trained.require_gradients()
            self.probed = True
        return loss, norm

    def _report(self, step: Step, number: int, loss: float, norm: float) -> StepReport:
        seconds = time.perf_counter() - step.started
        return StepReport(
            number=number,
            total=self.total,
            epoch=self.order.passes(number),
            loss=loss,
            tokens=step.tokens,
            tokens_per_second=step.tokens / seconds,
            learning_rate=step.rate,
            gradient_norm=norm,
            seconds=seconds,
        )

    def _require_finite(
        self, batches: Sequence[Batch], losses: Sequence[float], loss: float, norm: float
    ) -> None:
        if math.isfinite(norm) and math.isfinite(loss):
            return
        self.optimizer.zero_grad(set_to_none=True)
        pairs = list(zip(batches, losses, strict=True))
        wrong = [row for batch, value in pairs if not math.isfinite(value) for row in batch.rows]
        rows = self.processes.all_of(wrong)
        what = "loss" if rows else "gradient"
        rows = rows or self.processes.all_of([row for batch in batches for row in batch.rows])
        raise NonFinite(
            f"step {self.step + 1}: the {what} is not finite",
            where=self._places(rows),
            found=f"loss {loss}, gradient norm {norm}",
            hint="the weights were not touched and the last checkpoint stands, but resuming meets "
            "the same rows again; mend them, or lower the learning rate, and start anew",
        )

    def _places(self, rows: Sequence[int]) -> str:
        """Where rows stand in the data, the first of them one by one."""
        if len(self.data.parts) == 1:
            lines = sorted(self.data.examples[row].line for row in rows)
            named = ", ".join(map(str, lines[:NAMED_ROWS]))
            text = f"{self.data.name}, {self.data.unit}s {named}"
        else:
            text = "; ".join(self.data.place(row) for row in sorted(rows)[:NAMED_ROWS])
        more = len(rows) - NAMED_ROWS
        return f"{text} and {more} more" if more > 0 else text

    def finished(self, report: StepReport) -> StepReport:
        """The report with what follows a step: evaluation, checkpoint, the best state."""
        measured, improved = None, False
        if self.held_out is not None and self._evaluation_due():
            measured = measure(
                self.trained.model,
                self.held_out,
                batch_size=2 * self.config.batch_size,
                processes=self.processes,
            )
            self.watch.see_held_out(self.step, measured["loss"])
            improved = self.best.offer(measured["loss"], self.step, self.trained)
            self._stop_if_stale()
        if self._agreed_to_stop() and not self.over():
            self.interrupted = True
            self.notices.append(f"stopped on request after step {self.step}")
        path = state.save(self) if self._checkpoint_due() else None
        if self.over():
            self._restore_best()
        notices, self.notices = tuple(self.notices), []
        return dataclasses.replace(
            report, held_out=measured, best=improved, checkpoint=path, notices=notices
        )

    def _agreed_to_stop(self) -> bool:
        """Whether any process was asked to. A signal comes at any moment and to any of them, so
        only what they tell one another here counts: all stop after the same step.
        """
        return self.processes.total([float(self.asked_to_stop)])[0] > 0

    def _evaluation_due(self) -> bool:
        every = self.config.eval_every
        return self.over() or (every > 0 and self.step % every == 0)

    def _stop_if_stale(self) -> None:
        if self.config.patience and self.best.stale >= self.config.patience:
            self.stopped = True
            self.notices.append(
                f"stopped early after step {self.step}: "
                f"{self.best.stale} evaluations without improvement"
            )

    def _restore_best(self) -> None:
        """At the end; a run that is to go on keeps the state it goes on from."""
        if self.interrupted:
            return
        said = self.best.put_back(self.trained, self.step)
        if said is not None:
            self.notices.append(said)

    def _checkpoint_due(self) -> bool:
        if self.folder is None:
            return False
        every = self.config.checkpoint_every
        return self.interrupted or (every > 0 and (self.step % every == 0 or self.over()))
