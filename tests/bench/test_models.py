"""The models and batches that are measured."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from sidepath.bench.models import Shape, batch_of, config_of, make, token_ids, vocabulary
from sidepath.bench.step import labelled_loss, our_loss
from sidepath.injection.places import preset_paths

CPU = torch.device("cpu")
MILLION = 1e6


def without_memory(shape: Shape) -> nn.Module:
    """A model at its full size that holds no numbers."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config_of(shape))
    return model


@pytest.mark.parametrize(("shape", "millions"), [("llama", 100.1), ("gpt2", 124.4)])
def test_the_sizes_are_those_the_docs_name(shape: Shape, millions: float) -> None:
    total = sum(own.numel() for own in without_memory(shape).parameters())
    assert total / MILLION == pytest.approx(millions, abs=0.05)


def test_the_model_of_many_layers_has_224_and_an_adapter_of_ten_megabytes() -> None:
    model = without_memory("linears")
    paths = preset_paths(model, "all-linear")
    assert len(paths) == 224
    layers = [model.get_submodule(path).weight for path in paths]
    numbers = sum(8 * sum(weight.shape) for weight in layers)  # type: ignore[operator, arg-type, misc]
    assert 4 * numbers / MILLION == pytest.approx(10, abs=0.1)


@pytest.mark.parametrize("shape", ["llama", "gpt2", "linears"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_frozen_model_at_each_call(shape: Shape, dtype: str) -> None:
    state = torch.random.get_rng_state()
    one, other = (make(shape, dtype, CPU, quick=True) for _ in range(2))  # type: ignore[arg-type]
    assert torch.equal(state, torch.random.get_rng_state())
    assert one.training
    for mine, twin in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, twin)
        assert str(mine.dtype) == f"torch.{dtype}"
        assert not mine.requires_grad


def test_every_token_of_the_batch_is_supervised_and_the_losses_are_one() -> None:
    model = make("llama", "float32", CPU, quick=True)
    ids_BT = token_ids(model, 3, 8)
    assert torch.equal(ids_BT, token_ids(model, 3, 8))
    assert 3 <= int(ids_BT.min()) <= int(ids_BT.max()) < vocabulary(model)
    batch = batch_of(ids_BT)
    assert torch.equal(batch.targets_BT, ids_BT)
    assert batch.weight == 3 * 7
    torch.testing.assert_close(our_loss(model, ids_BT)(), labelled_loss(model, ids_BT)())
