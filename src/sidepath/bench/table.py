"""Every figure by its name, with what it is to reach; which are wanted; measuring them."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from sidepath.bench.compiled import Compiled
from sidepath.bench.counted import MergedOperators, PythonCalls
from sidepath.bench.crowd import Crowd, watched_crowd
from sidepath.bench.decode import Decode, Prefill
from sidepath.bench.figure import Figure, at_least, at_most
from sidepath.bench.memory import Memory
from sidepath.bench.peers import PEER_MISSING, has_peft
from sidepath.bench.routed import Routed
from sidepath.bench.setting import NOT_A_MEASUREMENT, Bench, Measure, machine, versions
from sidepath.bench.step import Step
from sidepath.bench.switching import Activate, Inject, Load, Swap
from sidepath.bench.timing import pinned_threads
from sidepath.errors import ConfigError, meant

BF16_STEP = {
    "ours / floor": at_most(0.95),
    "PEFT / ours": at_least(1.35),
    "ours / full": at_most(0.68),
}
F32_STEP = {"ours / floor": at_most(1.0), "PEFT / ours": at_least(1.2)}
OVER_BASE = {"ours / base": at_most(1.08)}
MS = 1e-3

FIGURES: Mapping[str, Measure] = {
    "step-llama-bf16": Step("llama", "bfloat16", 4, 256, BF16_STEP),
    "step-llama-bf16-all": Step("llama", "bfloat16", 4, 256, BF16_STEP, as_base=True),
    "step-llama-bf16-adamw": Step("llama", "bfloat16", 4, 256, optimizer=True),
    "step-llama-f32": Step("llama", "float32", 4, 128, F32_STEP),
    "step-gpt2-bf16": Step("gpt2", "bfloat16", 4, 256, {"ours / floor": at_most(0.95)}),
    "memory-saved": Memory("saved", "llama", "bfloat16", 4, 256, {"ours / PEFT": at_most(0.27)}),
    "memory-peak": Memory("peak", "llama", "bfloat16", 4, 256, {"ours / PEFT": at_most(0.35)}),
    "memory-peak-checkpointing": Memory(
        "peak", "llama", "bfloat16", 4, 256, {"ours / PEFT": at_most(0.2)}, checkpointing=True
    ),
    "decode-1": Decode("bfloat16", 1, OVER_BASE),
    "decode-8": Decode("bfloat16", 8, OVER_BASE),
    "decode-32": Decode("bfloat16", 32, OVER_BASE),
    "decode-prefill-8x128": Prefill("bfloat16", 8, 128, OVER_BASE),
    "decode-prefill-1x128": Prefill("bfloat16", 1, 128, OVER_BASE),
    "routed-forward-4-f32": Routed("float32", 8, 4, {"ours / base": at_most(1.06)}, 32),
    "routed-forward-4-bf16": Routed("bfloat16", 8, 4, {"ours / base": at_most(1.06)}, 32),
    "routed-forward-4-mixed-f32": Routed("float32", 8, 4, tokens=32, mixed=True),
    "routed-decode-4-f32": Routed("float32", 8, 4, {"ours / base": at_most(1.12)}),
    "routed-decode-4-bf16": Routed("bfloat16", 8, 4, {"ours / base": at_most(1.12)}),
    "routed-decode-64-f32": Routed("float32", 64, 64, {"ours / base": at_most(1.45)}),
    "routed-decode-64-bf16": Routed("bfloat16", 64, 64, {"ours / base": at_most(1.5)}),
    "routed-forward-64-f32": Routed("float32", 64, 64, {"ours / base": at_most(1.1)}, 16),
    "routed-forward-64-bf16": Routed("bfloat16", 64, 64, {"ours / base": at_most(1.15)}, 16),
    "switching-merged": MergedOperators({"ours / base": at_most(1.0)}),
    "switching-python-calls": PythonCalls({"ours": at_most(6)}),
    "switching-inject": Inject({"ours": at_most(20 * MS)}),
    "switching-load-1": Load(1, {"ours": at_most(20 * MS)}),
    "switching-load-10": Load(10, {"ours": at_most(20 * MS)}),
    "switching-load-100": Load(100, {"ours": at_most(20 * MS)}, peer=False),
    "switching-load-100-peft": Load(100, {"ours": at_most(20 * MS)}),
    "switching-activate-2": Activate(2, {"ours": at_most(0.05 * MS)}),
    "switching-activate-10": Activate(10, {"ours": at_most(0.05 * MS)}),
    "switching-activate-100": Activate(100, {"ours": at_most(0.05 * MS)}, peer=False),
    "switching-activate-100-peft": Activate(100, {"ours": at_most(0.05 * MS)}),
    "switching-swap-f32": Swap("float32"),
    "switching-swap-bf16": Swap("bfloat16"),
    "compiled-step-bf16": Compiled(True, "bfloat16", 4, 256),
    "compiled-step-f32": Compiled(True, "float32", 4, 128),
    "compiled-forward-bf16": Compiled(False, "bfloat16", 4, 256),
}
"""Name to function. The part of a name before its first dash is its family."""

ASKED_FOR = ("compiled", "switching-load-100-peft", "switching-activate-100-peft")
"""Families and figures that are measured only when named: each takes minutes."""


class Progress(Protocol):
    """Says how many figures are done, and what was measured last."""

    def __call__(self, done: int, total: int, facts: str = "") -> None: ...


def family(name: str) -> str:
    """The family of a figure: `step` of `step-llama-bf16`."""
    return name.partition("-")[0]


def chosen(wanted: Sequence[str]) -> list[str]:
    """The names of the figures wanted, each once: figures, families, or all that are quick.

    Raises `ConfigError` for names that are neither, with the nearest ones.
    """
    families = dict.fromkeys(map(family, FIGURES))
    unknown = [name for name in wanted if name not in FIGURES and name not in families]
    if unknown:
        known = [*families, *FIGURES]
        raise ConfigError(
            f"unknown figure{'s' * (len(unknown) > 1)} {', '.join(unknown)}",
            expected=", ".join(known),
            faults=[
                f"{name}: {meant(name, known) or 'nothing is named like it'}" for name in unknown
            ],
            hint="name figures or families; without any, all that do not take minutes are measured",
        )
    if not wanted:
        return [name for name in FIGURES if not {name, family(name)} & set(ASKED_FOR)]
    return [
        name
        for name in FIGURES
        if name in wanted or (family(name) in wanted and name not in ASKED_FOR)
    ]


def measured(
    names: Sequence[str],
    bench: Bench,
    *,
    threads: int,
    progress: Progress | None = None,
    figures: Mapping[str, Measure] = FIGURES,
) -> tuple[list[Figure], dict[str, Any]]:
    """The figures of these names, and the JSON document that holds them."""
    began, found = time.perf_counter(), []
    # A library's advice on models as tiny or as bare as these is of no use to anybody.
    with pinned_threads(threads), watched_crowd() as crowd, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        where = machine(bench.device)
        for done, name in enumerate(names, start=1):
            found.append(figures[name](name, bench))
            gc.collect()
            if progress is not None:
                progress(done, len(names), f"{name} done")
    document = {
        "figures": [figure.as_dict() for figure in found],
        "machine": where,
        "versions": versions(),
        "device": bench.device.type,
        "threads": threads,
        "rounds": bench.counted_rounds,
        "quick": bench.quick,
        "others_share": crowd.share,
        "notes": notes_of(bench, crowd),
        "seconds": time.perf_counter() - began,
    }
    return found, document


def notes_of(bench: Bench, crowd: Crowd) -> list[str]:
    """What a reader of the figures has to know."""
    said = [NOT_A_MEASUREMENT] if bench.quick else [crowd.note]
    missing = None if has_peft() else PEER_MISSING
    return [note for note in (*said, missing) if note is not None]
