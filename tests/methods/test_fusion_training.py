"""What regularises a fusion: its own penalty, in each step once, beside the data's loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sidepath.config import TrainConfig
from sidepath.data.dataset import Data, load_data
from sidepath.methods.bottleneck import Bottleneck
from sidepath.methods.fusion import AdapterFusion
from sidepath.store.adapter import Adapter, inject
from sidepath.training.loop import train
from sidepath.training.trained import trained_of
from tests.conftest import randomise, tiny_llama


@pytest.fixture
def data(tokenizer: Any, pairs: list[dict[str, str]]) -> Data:
    return load_data(pairs[:8], tokenizer)


def fused(regularise: float) -> tuple[nn.Module, Adapter]:
    """A model with two trained bottlenecks, and the fusion of both."""
    model = tiny_llama(vocab=258)
    for label in ("a", "b"):
        randomise(inject(model, Bottleneck("pfeiffer", size=4), label).parameters(), std=0.3)
    torch.manual_seed(1)
    return model, inject(model, AdapterFusion(regularise=regularise), "f")


def far(adapter: Adapter) -> float:
    """How far V is from the identity, squared, over all places."""
    values = [delta.tensors()["value"] for delta in adapter.deltas.values()]
    return sum(float((V - torch.eye(len(V))).detach().square().sum()) for V in values)


def after(data: Data, regularise: float, **settings: Any) -> tuple[Adapter, list[float]]:
    model, adapter = fused(regularise)
    config = TrainConfig(learning_rate=0.01, warmup=0.0, **settings)
    return adapter, [step.loss for step in train(model, data, config, adapter="f")]


def test_the_penalty_is_the_squared_distance_from_the_identity() -> None:
    model, adapter = fused(0.25)
    randomise(adapter.parameters())
    penalties: list[Any] = [delta.penalty() for delta in adapter.deltas.values()]
    assert torch.stack(penalties).sum().item() == pytest.approx(0.25 * far(adapter), rel=1e-5)
    trained_of(model, "f").penalise()
    for delta in adapter.deltas.values():
        V = delta.tensors()["value"]
        torch.testing.assert_close(V.grad, 0.5 * (V - torch.eye(32)).detach())
        others = [p for name, p in delta.named_parameters() if name != "value"]
        assert all(parameter.grad is None for parameter in others)
    assert all(delta.penalty() is None for delta in fused(0.0)[1].deltas.values())


def test_training_keeps_v_near_the_identity_and_reports_the_loss_of_the_data(data: Data) -> None:
    free, losses = after(data, 0.0, steps=4, batch_size=8)
    held, same = after(data, 100.0, steps=4, batch_size=8)
    assert far(held) < 0.5 * far(free)
    assert same[0] == losses[0]


def test_it_counts_once_a_step_however_many_passes_there_are(data: Data) -> None:
    whole, _ = after(data, 0.01, steps=4, batch_size=8)
    passes, _ = after(data, 0.01, steps=4, batch_size=2, accumulate=4)
    fourfold, _ = after(data, 0.04, steps=4, batch_size=8)
    for path, delta in whole.deltas.items():
        V, other = delta.tensors()["value"], fourfold.deltas[path].tensors()["value"]
        torch.testing.assert_close(V, passes.deltas[path].tensors()["value"], atol=1e-4, rtol=0)
        assert not torch.allclose(V, other, atol=1e-3, rtol=0)
