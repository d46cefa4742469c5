"""Python calls of ours in one adapted layer's forward pass, counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import sidepath
from sidepath.injection.surgery import activate, put_in
from sidepath.injection.targets import resolve
from sidepath.methods.lora import LoRA
from tests.calls import calls_in
from tests.conftest import randomise

OURS = str(Path(sidepath.__file__).parent)
MOST = 6
"""PEFT 0.21.2 makes 28 of its own."""


def calls_of_ours(model: nn.Module, x: torch.Tensor) -> list[str]:
    model(x)  # what is looked up once is known then
    return [call for call in calls_in(lambda: model(x)) if call.startswith(OURS)]


def adapted(kind: str, adapters: int = 1, dropout: float = 0.0) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5) if kind == "linear" else Conv1D(5, 6))
    config = LoRA(r=2, targets=("0",), dropout=dropout)
    for number in range(adapters):
        installed = put_in(model, config, f"a{number}", resolve(model, config))
        randomise(installed.parameters())
    activate(model, "a0")
    return model


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("adapters", [1, 5])
def test_in_inference(kind: str, adapters: int) -> None:
    model = adapted(kind, adapters).eval()
    with torch.no_grad():
        for rows in (3, 100):
            calls = calls_of_ours(model, torch.randn(rows, 6))
            assert 1 < len(calls) <= MOST, calls


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("adapters", [1, 5])
def test_in_training(kind: str, adapters: int) -> None:
    calls = calls_of_ours(adapted(kind, adapters).train(), torch.randn(3, 6))
    assert 1 < len(calls) <= MOST, calls


def test_the_count_sees_calls() -> None:
    """With dropout a mask is drawn, which is more calls than without."""
    with_mask = calls_of_ours(adapted("linear", dropout=0.5).train(), torch.randn(3, 6))
    without = calls_of_ours(adapted("linear").train(), torch.randn(3, 6))
    assert len(with_mask) > len(without)
    assert any("Mask.on" in call for call in with_mask)


def test_the_base_alone_costs_two_calls() -> None:
    """`Adapted.forward` and the view's call, whatever is loaded."""
    model = adapted("linear", 3)
    activate(model, None)
    assert len(calls_of_ours(model, torch.randn(3, 6))) == 2
