"""Feature-based transfer: each row goes through a frozen body once, and the steps read the result.

A run that trains nothing in the model's body trains a head over a fixed function of the rows. That
function is taken in eval mode (no dropout in the body; the head keeps its own), and its values are
kept in files, so that they take no memory that a plan would miss. The model runs as ever; only its
body answers from the files.

Rows go through the body in groups of like length that follow from the data and the batch size
alone, each when one of its rows is first asked for. So a row's features have the same bits in every
run with these settings, resumed ones too. From those of the very batch that a step trains on they
differ by rounding, since the order in which a matrix product adds depends on its shape.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sidepath.config import TrainConfig
from sidepath.data.dataset import Data
from sidepath.injection.head import frozen_body
from sidepath.injection.registry import registry_of
from sidepath.store.plan import readable
from sidepath.training.batching import Batch, by_length, collate
from sidepath.training.columns import Blank, Column, Stored
from sidepath.training.loss import batch_loss
from sidepath.training.trained import Trained, device_of, modes_kept

Forward = Callable[..., Any]


class Features(ABC):
    """Where the features of a run's rows come from."""

    def __init__(self, notice: str | None = None) -> None:
        self.notice = notice
        """What the user is told."""
        self.seconds = 0.0
        """Time that it took rows to go through the body and into files."""
        self.columns: dict[str, Column] = {}
        """What is kept, by the body's name for it."""

    @abstractmethod
    def answering(self, batch: Batch) -> AbstractContextManager[None]:
        """Within the block the model may be called with `batch`."""

    def close(self) -> None:
        """Let go of what is kept, and of the files it is in."""
        self.columns.clear()


class Trainable(Features):
    """Something in the body is trained, or no one module is the body: the model runs as it is."""

    def answering(self, batch: Batch) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


def features_of(trained: Trained, data: Data, config: TrainConfig, *, again: bool) -> Features:
    """Where the features of a run come from. Called under the autocast of its forward passes.

    `again`: whether rows are used more than once.
    """
    body = _body_below(trained)
    if body is None:
        return Trainable()
    registry = registry_of(trained.model)
    reasons = {
        "no row is used twice": not again,
        "a transform may change a row each time": data.transform is not None,
        "the rows are packed": config.packing,
        "the model is compiled": any(
            module._compiled_call_impl is not None for module in (trained.model, body)
        ),
        "the base is sharded, and all processes must run it equally often": (
            registry is not None and registry.sampled is not None
        ),
    }
    unkept = next((reason for reason, holds in reasons.items() if holds), None)
    if unkept is None:
        try:
            return Kept(trained.model, body, data, config.batch_size)
        except _Unkept as error:
            unkept = str(error)
    return Recomputed(body, unkept)


def _body_below(trained: Trained) -> nn.Module | None:
    """The model's body, if nothing in it is trained."""
    model = trained.model
    if trained.adapter is not None:
        return frozen_body(model, trained.adapter.deltas)
    own = {id(parameter) for parameter in trained.parameters.values()}
    every = model.named_parameters(remove_duplicate=False)  # a tied one by all of its names
    return frozen_body(model, [name for name, parameter in every if id(parameter) in own])


class Recomputed(Features):
    """A frozen body runs in each step: its features cannot, or need not, be kept."""

    def __init__(self, body: nn.Module, why: str) -> None:
        super().__init__(f"the frozen body runs in each step: {why}")
        self._body = body

    def answering(self, batch: Batch) -> AbstractContextManager[None]:
        self._body.eval()
        return contextlib.nullcontext()


class Kept(Features):
    """A frozen body's outputs for the rows of the data, in temporary files."""

    def __init__(self, model: nn.Module, body: nn.Module, data: Data, size: int) -> None:
        """Find out what the head reads and make room for it.

        `size`: rows that go through the body at once. Errors: `_Unkept`.
        """
        super().__init__()
        self._body, self._data, self._device = body, data, device_of(model)
        output, read = self._read_by_head(model)
        self._kind = type(output)
        self.columns = self._files(output, read)
        self._groups = by_length(data.lengths, size)
        self._group_of = np.zeros(len(data), dtype=np.int64)
        for number, rows in enumerate(self._groups):
            self._group_of[rows] = number
        self._there = np.zeros(len(self._groups), dtype=np.bool_)
        taken = readable(sum(column.bytes for column in self.columns.values()))
        self.notice = (
            f"each of {len(data):,} rows goes through the frozen body once; "
            f"their features take {taken} of temporary files"
        )

    @contextlib.contextmanager
    def answering(self, batch: Batch) -> Iterator[None]:
        self._body.eval()
        if not batch.rows:  # an idle pass, which has no rows of its own
            yield
            return

        def answer(own: Forward, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
            groups = np.unique(self._group_of[list(batch.rows)])
            for number in groups[~self._there[groups]].tolist():
                started = time.perf_counter()
                group = self._collated(self._groups[number])
                with torch.no_grad():
                    output = own(
                        *(_for(group, one, batch) for one in args),
                        **{name: _for(group, one, batch) for name, one in options.items()},
                    )
                self._keep(number, output)
                self.seconds += time.perf_counter() - started
            return self._output(batch)

        with _instead(self._body, answer):
            yield

    def _keep(self, number: int, output: Mapping[str, Tensor]) -> None:
        for name, column in self.columns.items():
            column.put(self._groups[number], output[name])
        self._there[number] = True

    def _output(self, batch: Batch) -> Any:
        tokens = batch.ids_BT.shape[1]
        found = {name: column.of(batch.rows, tokens) for name, column in self.columns.items()}
        return self._kind(**{name: tensor.to(self._device) for name, tensor in found.items()})

    def _collated(self, rows: Sequence[int]) -> Batch:
        examples = [self._data.examples[row] for row in rows]
        return collate(examples, rows, self._data.pad_id).to(self._device)

    def _files(self, output: Mapping[str, Tensor], read: set[str]) -> dict[str, Column]:
        lengths = np.asarray(self._data.lengths)
        made: dict[str, Column] = {}
        for name, like in output.items():
            counts = lengths if like.dim() == 3 else np.ones_like(lengths)
            try:
                made[name] = Stored(like, counts) if name in read else Blank(like)
            except OSError as error:
                raise _Unkept(
                    f"no room for the features of {len(lengths):,} rows ({error.strerror}); make "
                    "room in the temporary folder, or name another in TMPDIR"
                ) from error
        return made

    def _read_by_head(self, model: nn.Module) -> tuple[Any, set[str]]:
        """The body's output for the longest row and the shortest, and which of its tensors the
        head reads: those that the loss has a gradient for, be it zero.

        Errors: `_Unkept` for a body that is called with, or gives, more than is understood here,
        and for a head that reads the padding, which no row has by itself.
        """
        order = np.argsort(np.asarray(self._data.lengths))
        pair = self._collated([int(order[-1]), int(order[0])])
        outputs: list[Any] = []

        def answer(own: Forward, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
            with torch.no_grad():
                output = own(*args, **options)
            _require_understood(pair, [*args, *options.values()], output)
            for tensor in output.values():
                tensor.requires_grad_()
            outputs.append(output)
            return output

        with modes_kept(model), _instead(self._body, answer):
            loss = batch_loss(model.eval(), pair)
        if len(outputs) != 1:
            raise _Unkept(f"the model calls it {len(outputs)} times for a batch")
        names, tensors = zip(*outputs[0].items(), strict=True)
        found = torch.autograd.grad(loss, tensors, allow_unused=True)
        read = {name: one for name, one in zip(names, found, strict=True) if one is not None}
        padding = slice(self._data.lengths[int(order[0])], None)
        if any(one.dim() == 3 and bool(one[1, padding].any()) for one in read.values()):
            raise _Unkept("the head reads the padding behind a row")
        return outputs[0], set(read)


class _Unkept(Exception):
    """Why features cannot be kept."""


def _require_understood(batch: Batch, inputs: Sequence[Any], output: Any) -> None:
    own = (batch.ids_BT, batch.attention_mask_BT)
    if any(isinstance(one, Tensor) and all(one is not known for known in own) for one in inputs):
        raise _Unkept("it is called with more than token ids and their mask")
    shapes = (batch.ids_BT.shape, batch.ids_BT.shape[:1])
    for one in output.values() if isinstance(output, Mapping) else [output]:
        floating = isinstance(one, Tensor) and one.is_floating_point()
        if not floating or one.shape[:-1] not in shapes:
            raise _Unkept("it gives something else than a vector for each token or row")


def _for(group: Batch, argument: Any, batch: Batch) -> Any:
    """An argument of the call for `batch`, as it is for `group`."""
    if argument is batch.ids_BT:
        return group.ids_BT
    if argument is batch.attention_mask_BT:
        return group.attention_mask_BT
    assert not isinstance(argument, Tensor), "it was called without one when that was looked at"
    return argument


@contextlib.contextmanager
def _instead(
    module: nn.Module, answer: Callable[[Forward, Sequence[Any], Mapping[str, Any]], Any]
) -> Iterator[None]:
    """Within the block `answer(own forward, arguments, options)` gives the module's output."""
    own, before = module.forward, module.__dict__.get("forward")

    def forward(*args: Any, **options: Any) -> Any:
        return answer(own, args, options)

    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before
