"""A base, an adapter on it and a few rows, for other people's trainers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sidepath
from sidepath import LoRA
from sidepath.store.adapter import Adapter
from tests.training.kit import llama

IDS = torch.tensor([[0, 9, 8, 7, 12, 13]])


class Subject:
    """An injected model that remembers its base."""

    def __init__(self, **fields: Any) -> None:
        self.model = llama()
        self.base = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.config = LoRA(**{"r": 4, "alpha": 8.0, **fields})
        torch.manual_seed(5)
        self.adapter: Adapter = sidepath.inject(self.model, self.config, "a")
        self.fresh = {name: p.detach().clone() for name, p in self.trained().items()}

    def trained(self) -> dict[str, Tensor]:
        """The adapter's parameters by their name in the model."""
        return {name: p for name, p in self.model.named_parameters() if name not in self.base}

    def logits(self, model: Any = None) -> Tensor:
        """What the model answers to a fixed row."""
        model = self.model if model is None else model
        with torch.no_grad():
            result: Tensor = model.eval()(input_ids=IDS).logits
        return result

    def take_back_from(self, trainer: Any) -> None:
        """Take accelerate's autocast off the model's `forward`, which a bf16 Trainer leaves on."""
        unwrapped = trainer.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        assert unwrapped is self.model

    def check_only_the_adapter_moved(self) -> None:
        """Base bit-equal, frozen and under its own names; every side path moved."""
        now = self.model.state_dict()
        assert self.base.keys() <= now.keys()
        assert all(torch.equal(now[name], tensor) for name, tensor in self.base.items())
        trained = self.trained()
        assert trained.keys() == self.fresh.keys()
        assert all(not torch.equal(trained[name], self.fresh[name]) for name in trained)
        for name, parameter in self.model.named_parameters():
            assert parameter.requires_grad == (name in trained)

    def check_saved_and_reloaded(self, folder: Path) -> None:
        """Saved, loaded onto a fresh base, and gone from the model it came from."""
        self.adapter.save(folder)
        tuned = self.logits()
        other = llama()
        sidepath.load(other, folder)
        assert torch.equal(self.logits(other), tuned)
        sidepath.remove(self.model, "a")
        assert self.model.state_dict().keys() == self.base.keys()
        plain = self.logits(llama())
        assert torch.equal(self.logits(), plain)
        assert not torch.equal(tuned, plain)


@pytest.fixture
def subject() -> Subject:
    """A tiny Llama with an adapter on all its linear layers."""
    return Subject()


@pytest.fixture(autouse=True)
def _process_state() -> Iterator[None]:
    """The process-wide state of accelerate (mixed precision) does not leak into the next test."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
