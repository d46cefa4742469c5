"""What is counted instead of timed: operator calls of a merged model, Python calls of a layer."""

from __future__ import annotations

import sys
from collections import Counter
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
PACKAGES = {OURS: "sidepath", PEER: "peft"}


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
    """Calls of Python functions, torch's too, that an adapter adds to a linear layer's forward."""

    targets: Targets = field(default_factory=dict)

    def __call__(self, name: str, bench: Bench) -> Figure:
        models = answering("llama", "float32", bench)
        calls = {way: python_calls(*_layer_of(model)) for way, model in models.items()}
        plain = calls.pop(BASE).total()
        samples = {way: [float(count.total() - plain)] for way, count in calls.items()}
        what = "Python calls that an adapter adds to one linear layer's forward pass"
        own = ", ".join(f"{way} {count[PACKAGES[way]]}" for way, count in calls.items())
        notes = [f"the plain layer's own {plain} left out", f"of the library's own code: {own}"]
        return figure_of(name, what, samples, self.targets, unit="calls", notes=notes)


def operator_calls(action: Action) -> int:
    """How many operators an action calls, as torch dispatches them."""
    counter = _Operators()
    with counter:
        action()
    return counter.count


def python_calls(layer: nn.Module, x: Tensor) -> Counter[str]:
    """How many Python functions of each package a layer's forward pass enters."""
    count: Counter[str] = Counter()

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            count[str(frame.f_globals.get("__name__")).partition(".")[0]] += 1

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
