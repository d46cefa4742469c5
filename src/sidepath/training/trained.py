"""What a run trains: the tensors, how they are opened for it, and how the model is put back."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sidepath.config import TrainConfig
from sidepath.data.dataset import Data
from sidepath.errors import DataError, TrainError
from sidepath.injection.registry import Installed, registry_of
from sidepath.methods.tokens import TokenRows
from sidepath.store.memory import switch_checkpointing


@dataclass(frozen=True, eq=False)
class Trained:
    """The trained parameters of a model, by a name that does not depend on the adapter's."""

    model: nn.Module
    adapter: Installed | None
    """None: full fine-tuning of whatever requires a gradient."""
    parameters: dict[str, nn.Parameter]
    """What the optimiser moves."""
    tensors: dict[str, Tensor]
    """What a checkpoint holds: the parameters, and buffers that training changes."""
    groups: dict[str, list[nn.Parameter]]
    """Parameters that must get a gradient together: one group a delta."""
    rates: dict[str, float] = field(default_factory=dict)
    """Learning rates that are not the run's, by name, as multiples of it."""

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the tensors."""
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    def put(self, state: dict[str, Tensor]) -> None:
        """Write a state of `snapshot`'s names and shapes into the model, in place."""
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(state[name])

    def penalise(self) -> None:
        """Add the gradients of the deltas' own penalties, once a step and in every process alike:
        they are no share of a batch.
        """
        for delta in {} if self.adapter is None else self.adapter.deltas.values():
            penalty = delta.penalty()
            if penalty is not None:
                penalty.backward()  # type: ignore[no-untyped-call]

    def require_gradients(self) -> None:
        """The one-step probe: raise a `TrainError` naming every delta that got no gradient.

        A fresh low-rank delta has one factor at zero, so the other one's gradient is zero: one
        matrix of each delta must have a gradient that is not. Deltas without a matrix (biases,
        norms) must have one on some tensor.
        """
        dead = []
        for path, parameters in self.groups.items():
            matrices = [parameter for parameter in parameters if parameter.dim() >= 2]
            if not any(_has_gradient(parameter) for parameter in matrices or parameters):
                dead.append(path)
        if dead:
            raise TrainError(
                "the first step would train nothing here: no gradient",
                found=f"{len(dead)} of {len(self.groups)} side paths got none",
                faults=dead,
                hint="these modules take no part in the forward pass; choose other targets",
            )


def _has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


def trained_of(model: nn.Module, adapter: str | None) -> Trained:
    """What a run on `model` trains: the adapter named, or the active one; without any adapter
    on the model every parameter that requires a gradient.

    Raises:
        TrainError: no adapter is active, one is merged in, or nothing requires a gradient.
        UnknownAdapter: no adapter of that name is on the model.
    """
    registry = registry_of(model)
    if registry is None:
        if adapter is not None:
            raise TrainError(
                f'adapter "{adapter}" cannot be trained: the model holds no adapter',
                hint="sidepath.inject(model, config) first",
            )
        return _whole_model(model)
    if registry.merged is not None:
        raise TrainError(
            f'adapter "{registry.merged}" is merged into the base',
            hint="sidepath.unmerge(model) first",
        )
    name = adapter if adapter is not None else registry.routing.active
    if name is None:
        raise TrainError(
            "the model has adapters and none of them is active",
            found=", ".join(f'"{known}"' for known in registry.adapters),
            hint="name one: train(..., adapter=...), or sidepath.activate(model, name)",
        )
    return _adapter_only(model, registry.adapter(name))


def _adapter_only(model: nn.Module, installed: Installed) -> Trained:
    parameters: dict[str, nn.Parameter] = {}
    tensors: dict[str, Tensor] = {}
    groups: dict[str, list[nn.Parameter]] = {}
    rates: dict[str, float] = {}
    for path, delta in installed.deltas.items():
        rows = isinstance(delta, TokenRows)  # the first batch need not hold its tokens
        if not rows and (own := list(delta.parameters())):  # all may be lent by another
            groups[path] = own
        for name, parameter in delta.named_parameters():
            parameters[f"{path}.{name}"] = parameter
            rate = installed.config.rate_of(delta, name)
            if rate != 1:
                rates[f"{path}.{name}"] = rate
        buffers = {
            name: buffer for name, buffer in delta.named_buffers() if _persistent(delta, name)
        }
        for name, tensor in {**dict(delta.named_parameters()), **buffers}.items():
            tensors[f"{path}.{name}"] = tensor
    return Trained(model, installed, parameters, tensors, groups, rates)


def _whole_model(model: nn.Module) -> Trained:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise TrainError(
            "nothing to train: no adapter on the model, and no parameter requires a gradient",
            hint="sidepath.inject(model, config) first",
        )
    kept = {name: buffer for name, buffer in model.named_buffers() if _persistent(model, name)}
    groups = {"the model": list(parameters.values())}
    return Trained(model, None, parameters, {**parameters, **kept}, groups)


def _persistent(module: nn.Module, name: str) -> bool:
    path, _, own = name.rpartition(".")
    return own not in module.get_submodule(path)._non_persistent_buffers_set


@contextlib.contextmanager
def opened(trained: Sequence[Trained], config: TrainConfig) -> Iterator[None]:
    """Open one model for training these parts of it, the first of which is active.

    Afterwards every mode, `requires_grad`, the active adapter and the kernels in use are what
    they were.
    """
    model: Any = trained[0].model
    registry = registry_of(model)
    needed = {id(parameter) for part in trained for parameter in part.parameters.values()}
    kept = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    active = None if registry is None else registry.routing.active
    fused = registry is not None and registry.routing.fused
    checkpointed = config.gradient_checkpointing and not _is_checkpointing(model)
    with modes_kept(model):
        try:
            for parameter, _ in kept:
                parameter.requires_grad_(id(parameter) in needed)
            if registry is not None and trained[0].adapter is not None:
                registry.routing.active = trained[0].adapter.name
                registry.routing.fused = fused and config.kernels == "fused"
            if checkpointed:
                switch_checkpointing(model, on=True)
            model.train()
            yield
        finally:
            if checkpointed:
                switch_checkpointing(model, on=False)
            if registry is not None:
                registry.routing.active = active
                registry.routing.fused = fused
            for parameter, required in kept:
                parameter.requires_grad_(required)
                if id(parameter) in needed:
                    parameter.grad = None


def _is_checkpointing(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Give every module its own `training` flag back after the block."""
    kept = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in kept:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """Where the model's inputs belong: the device of its first parameter."""
    return next(model.parameters()).device


def context_of(model: Any) -> float:
    """Most tokens a row may have: what the model's positions reach, less those that the active
    adapter takes; infinite when its config names no limit.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return math.inf if limit is None else float(limit - _taken(model))


def _taken(model: nn.Module) -> int:
    """Positions of each row that the active adapter takes for itself."""
    registry = registry_of(model)
    active = None if registry is None else registry.adapters.get(registry.routing.active or "")
    return 0 if active is None else active.config.positions


def require_fit(model: Any, data: Data) -> None:
    """Raise one `DataError` with everything about which the model and the data disagree."""
    faults = [] if len(data) else ["there are no rows"]
    longest, context = max(data.lengths, default=0), context_of(model)
    vocabulary = model.config.get_text_config().vocab_size
    if longest > context:
        taken = _taken(model)
        less = f", less {taken} that the adapter takes" if taken else ""
        faults.append(
            f"a row has {longest} tokens, the model's context is {context + taken:.0f}{less}"
        )
    if data.largest_id >= vocabulary:
        faults.append(
            f"token id {data.largest_id} is beyond the model's vocabulary of {vocabulary}: "
            "the tokenizer belongs to another model"
        )
    if data.task == "classify":
        if len(data.labels) > model.config.num_labels:
            faults.append(
                f"{len(data.labels)} labels ({', '.join(data.labels)}), "
                f"the model has {model.config.num_labels} classes"
            )
        if model.config.get_text_config().pad_token_id is None:
            faults.append("the model's config has no pad_token_id, so it cannot tell padding")
    if faults:
        raise DataError("the data do not fit the model", where=data.name, faults=faults)
