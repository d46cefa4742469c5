"""Calls are counted, not timed."""

from __future__ import annotations

import torch
from torch import nn

from sidepath.bench.counted import MergedOperators, PythonCalls, operator_calls, python_calls
from sidepath.bench.setting import Bench


def inner(x: torch.Tensor) -> torch.Tensor:
    """One call."""
    return x


class Calls(nn.Module):
    """A module whose forward pass calls `inner` so many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input."""
        for _ in range(self.times):
            inner(x)
        return x


def test_operators() -> None:
    x = torch.ones(3)
    assert operator_calls(lambda: x + x * x) == 2


def test_python_calls() -> None:
    x = torch.ones(1)
    few, more = (python_calls(Calls(times), x) for times in (1, 4))
    assert more.total() - few.total() == 3
    assert few["torch"] == more["torch"] > 0


def test_a_merged_model_calls_the_bases_operators(quick: Bench) -> None:
    found = MergedOperators()("x", quick)
    assert found.unit == "calls"
    assert found.ways["ours"].median == found.ways["base"].median > 10


def test_an_adapter_adds_calls(quick: Bench) -> None:
    found = PythonCalls()("x", quick)
    assert found.ways["ours"].median > 0
    assert "of the library's own code: ours" in found.notes[1]
