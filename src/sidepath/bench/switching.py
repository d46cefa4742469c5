"""Adapters that come and go: injecting, loading, activating, and changing the merged one."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from sidepath.bench.figure import OURS, PEER, Figure, Targets, figure_of
from sidepath.bench.models import DType, make
from sidepath.bench.peers import ALPHA, RANK, has_peft, with_ours, with_peft
from sidepath.bench.setting import Bench
from sidepath.bench.timing import Action
from sidepath.injection.merging import merge, unmerge
from sidepath.injection.registry import require_registry
from sidepath.injection.surgery import activate, remove
from sidepath.methods.lora import LoRA
from sidepath.store.adapter import Adapter, inject, load

PLACE = "a Llama of 224 linear layers, LoRA r=8"
QUICK_LOADED = 3


@dataclass(frozen=True)
class Inject:
    """A fresh adapter on all linear layers, taken out again between the runs."""

    targets: Targets = field(default_factory=dict)

    def __call__(self, name: str, bench: Bench) -> Figure:
        ours = _fresh(bench)
        config = LoRA(r=RANK, alpha=ALPHA)
        actions: dict[str, Action] = {OURS: lambda: inject(ours, config, "fresh")}
        after: dict[str, Action] = {OURS: lambda: remove(ours, "fresh")}
        if has_peft():
            peer = _PeftInjected(_fresh(bench))
            actions[PEER], after[PEER] = peer.inject, peer.remove
        samples, peaks = bench.timed(actions, after=after)
        return figure_of(name, f"inject, {PLACE}", samples, self.targets, peak_bytes=peaks)


@dataclass(frozen=True)
class Load:
    """One adapter's folder (10 MB, 448 tensors) put on a model that holds others already."""

    loaded: int
    targets: Targets = field(default_factory=dict)
    peer: bool = True

    def __call__(self, name: str, bench: Bench) -> Figure:
        with tempfile.TemporaryDirectory() as folder:
            held = Held(bench, self.loaded, Path(folder), peer=self.peer)
            actions: dict[str, Action] = {OURS: lambda: load(held.ours, folder, "next")}
            after: dict[str, Action] = {OURS: lambda: remove(held.ours, "next")}
            if held.peft is not None:
                peft = held.peft
                actions[PEER] = lambda: peft.load_adapter(folder, "next")
                after[PEER] = lambda: peft.delete_adapter("next")
            samples, peaks = bench.timed(actions, after=after)
        what = f"load one adapter where {held.count} are loaded already, {PLACE}"
        return figure_of(name, what, samples, self.targets, notes=held.notes, peak_bytes=peaks)


@dataclass(frozen=True)
class Activate:
    """Another adapter becomes the one that answers."""

    loaded: int
    targets: Targets = field(default_factory=dict)
    peer: bool = True

    def __call__(self, name: str, bench: Bench) -> Figure:
        with tempfile.TemporaryDirectory() as folder:
            held = Held(bench, self.loaded, Path(folder), peer=self.peer)
        turn = itertools.cycle(held.names)
        actions: dict[str, Action] = {OURS: lambda: activate(held.ours, next(turn))}
        if held.peft is not None:
            peft, peers_turn = held.peft, itertools.cycle(held.names)
            actions[PEER] = lambda: peft.set_adapter(next(peers_turn))
        samples, peaks = bench.timed(actions)
        what = f"activate one of {held.count} adapters, {PLACE}"
        return figure_of(name, what, samples, self.targets, notes=held.notes, peak_bytes=peaks)


@dataclass(frozen=True)
class Swap:
    """The merged adapter changes: `unmerge` and `merge` of another, against copying the weights."""

    dtype: DType
    targets: Targets = field(default_factory=dict)

    def __call__(self, name: str, bench: Bench) -> Figure:
        names = ("first", "second")
        ours = with_ours(make("llama", self.dtype, bench.device, quick=bench.quick), names)
        merge(ours, names[0])
        turn = itertools.cycle(reversed(names))
        weights = [ours.get_submodule(path).weight for path in _paths(ours, names[0])]

        def swap() -> None:
            unmerge(ours)
            merge(ours, next(turn))

        actions: dict[str, Action] = {
            "copy": lambda: [weight.detach().clone() for weight in weights],  # type: ignore[operator]
            OURS: swap,
        }
        if has_peft():
            peft: Any = with_peft(make("llama", self.dtype, bench.device, quick=bench.quick), names)
            actions[PEER] = _peft_swap(peft, names)
        samples, peaks = bench.timed(actions)
        what = f"unmerge, then merge another adapter, llama {self.dtype}"
        copied = "copy: clones of the weights that change"
        return figure_of(
            name, what, samples, self.targets, reference="copy", notes=[copied], peak_bytes=peaks
        )


class Held:
    """Models with some adapters loaded, all from one folder that is written for it."""

    def __init__(self, bench: Bench, loaded: int, folder: Path, *, peer: bool) -> None:
        self.count = min(loaded, QUICK_LOADED) if bench.quick else loaded
        self.names = [f"adapter-{number}" for number in range(self.count)]
        self.notes: list[str] = []
        self.ours = with_ours(_fresh(bench), self.names[:1])
        Adapter(self.names[0], self.ours).save(folder)
        for name in self.names[1:]:
            load(self.ours, folder, name)
        self.peft: Any = None
        if peer and has_peft():
            self.peft = with_peft(_fresh(bench), self.names[:1])
            for name in self.names[1:]:
                self.peft.load_adapter(str(folder), name)
        elif has_peft():
            self.notes.append("PEFT left out: filling it with so many adapters takes minutes")


class _PeftInjected:
    """PEFT's adapter on a model, put in and taken out again."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.made: Any = None

    def inject(self) -> None:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        self.made = get_peft_model(self.model, config)

    def remove(self) -> None:
        self.model = self.made.unload()


def _peft_swap(peft: Any, names: tuple[str, str]) -> Callable[[], None]:
    peft.base_model.merge_adapter([names[0]])
    turn = itertools.cycle(reversed(names))

    def swap() -> None:
        peft.base_model.unmerge_adapter()
        peft.base_model.merge_adapter([next(turn)])

    return swap


def _fresh(bench: Bench) -> nn.Module:
    return make("linears", "float32", bench.device, quick=bench.quick).eval()


def _paths(model: nn.Module, name: str) -> list[str]:
    return list(require_registry(model).adapter(name).deltas)
