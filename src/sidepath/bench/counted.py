"""What is counted instead of timed: operator calls of a merged model, Python calls of a layer."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sidepath.bench.decode import BASE, answering, forward_of
from sidepath.bench.figure import OURS, PEER, Figure, Targets, figure_of
from sidepath.bench.models import token_ids
from sidepath.bench.setting import Bench
from sidepath.bench.timing import Action
from sidepath.injection.merging import merge

PROJECTION = "q_proj"


@dataclass(frozen=True)
class MergedOperators:
    """Operator calls of one forward pass with the adapter merged, beside the base's own."""

    targets: Targets = field(default_factory=dict)

    def __call__(self, name: str, bench: Bench) -> Figure:
        models = answering("llama", "float32", bench)
        merge(models[OURS], OURS)
        if PEER in models:
            peft: Any = models[PEER]
            peft.base_model.merge_adapter()
        ids_BT = token_ids(models[BASE], bench.rows(2), bench.tokens(16))
        samples = {
            way: [float(operator_calls(forward_of(model, ids_BT)))] for way, model in models.items()
        }
        what = "operator calls of one forward pass, the adapter merged, llama float32"
        return figure_of(name, what, samples, self.targets, unit="calls", reference=BASE)


@dataclass(frozen=True)
class PythonCalls:
    """Calls of Python functions that one adapted linear layer adds to a plain one's forward."""

    targets: Targets = field(default_factory=dict)

    def __call__(self, name: str, bench: Bench) -> Figure:
        models = answering("llama", "float32", bench)
        calls = {way: python_calls(*_layer_of(model)) for way, model in models.items()}
        plain = calls.pop(BASE)
        samples = {way: [float(count - plain)] for way, count in calls.items()}
        what = "Python calls an adapter adds to one linear layer's forward pass"
        plains = f"the plain layer's own: {plain}"
        return figure_of(name, what, samples, self.targets, unit="calls", notes=[plains])


def operator_calls(action: Action) -> int:
    """How many operators an action calls, as torch dispatches them."""
    counter = _Operators()
    with counter:
        action()
    return counter.count


def python_calls(layer: nn.Module, x: Tensor) -> int:
    """How many Python functions a layer's forward pass enters, its own call included."""
    count = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    with torch.no_grad():
        layer(x)
        before = sys.getprofile()
        sys.setprofile(profile)
        try:
            layer(x)
        finally:
            sys.setprofile(before)
    return count


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _layer_of(model: nn.Module) -> tuple[nn.Module, Tensor]:
    """The first query projection of a model, and an input for it."""
    found = [
        module
        for path, module in model.named_modules()
        if path.endswith(f".{PROJECTION}") and path.count(PROJECTION) == 1
    ]
    weight: Any = next(found[0].parameters())
    return found[0], torch.ones(2, 4, weight.shape[1], device=weight.device, dtype=weight.dtype)
