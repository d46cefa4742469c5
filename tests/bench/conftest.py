"""A bench at quick size, and figures as they come out of it."""

from __future__ import annotations

import sys

import pytest
import torch

from sidepath.bench.figure import Figure, at_least, at_most, figure_of
from sidepath.bench.setting import Bench


@pytest.fixture
def quick() -> Bench:
    """Tiny shapes, two rounds."""
    return Bench(device=torch.device("cpu"), quick=True)


@pytest.fixture
def without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer as if it were not installed."""
    monkeypatch.setitem(sys.modules, "peft", None)


@pytest.fixture
def figures() -> list[Figure]:
    """One of each unit, with and without the peer."""
    step = figure_of(
        "step-x",
        "a step",
        {"floor": [1.0, 2.0, 4.0], "ours": [1.1, 2.0, 3.6], "PEFT": [1.5, 3.0, 5.4]},
        {"ours / floor": at_most(0.95), "PEFT / ours": at_least(1.35)},
        reference="floor",
        notes=["a note"],
    )
    saved = figure_of(
        "memory-x",
        "bytes",
        {"floor": [2.0**20], "ours": [2.0**21], "PEFT": [2.0**23]},
        {"ours / PEFT": at_most(0.27)},
        unit="bytes",
        reference="floor",
    )
    inject = figure_of("inject-x", "inject", {"ours": [0.01, 0.02, 0.03]}, {"ours": at_most(0.02)})
    return [step, saved, inject]
