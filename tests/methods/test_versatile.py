"""VersatileLM against its formula, put onto the untouched model by hand, and its counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from sidepath.errors import ConfigError, TargetNotFound
from sidepath.injection.registry import registry_of, require_registry
from sidepath.methods.bottleneck import AdapterLayer
from sidepath.methods.versatile import TaskEmbedding, VersatileLM
from sidepath.store.adapter import inject
from tests.conftest import randomise
from tests.methods.architectures import ARCHITECTURES, inputs_of, logits_of
from tests.methods.kit import trained
from tests.methods.test_bottleneck import written_out


@pytest.mark.parametrize("name", ["gpt2", "t5", "deberta-v2"])
def test_versatile_lm_is_the_formula_on_whole_blocks(name: str) -> None:
    """Hand-made with hooks on the untouched model: blocks of T5 and DeBERTa give tuples."""
    inputs = inputs_of(name)
    model = ARCHITECTURES[name]()
    deltas = inject(model, VersatileLM(size=3), "a").deltas
    randomise(require_registry(model).adapter("a").parameters())
    with torch.no_grad():
        found = logits_of(model, inputs)
    plain = ARCHITECTURES[name]()
    for path, delta in deltas.items():
        tensors = delta.tensors()

        def changed(_: nn.Module, args: Any, y: Any, tensors: Any = tensors) -> Any:
            if "task" in tensors:
                return y + tensors["task"]
            h = y[0] if isinstance(y, tuple) else y
            h = h + written_out(tensors, h, torch.relu, 1.0)
            return (h, *y[1:]) if isinstance(y, tuple) else h

        plain.get_submodule(path).register_forward_hook(changed)
    with torch.no_grad():
        assert torch.allclose(found, logits_of(plain, inputs), atol=1e-5)


@pytest.mark.parametrize("size", [300, 100, 10])
def test_counts_of_versatile_lm(shared: Path, size: int) -> None:
    facts = json.loads((shared / "papers" / "baselines.json").read_text())["versatile_lm"]
    base = transformers.GPT2Config(vocab_size=8)
    without = VersatileLM(size=size, task_embedding=False)
    count = trained(base, without, transformers.GPT2Model)
    assert count == facts["derived_counts_gpt2_small"][str(size)]
    assert trained(base, VersatileLM(size=size), transformers.GPT2Model) == count + 768


def test_near_identity_is_small_beside_a_state_of_size_one() -> None:
    model = ARCHITECTURES["gpt2"]()
    deltas = inject(model, VersatileLM(size=64, start="near-identity")).deltas.values()
    kinds = [type(delta) for delta in deltas]
    assert kinds == [TaskEmbedding, AdapterLayer, AdapterLayer]
    for delta in deltas:
        if isinstance(delta, TaskEmbedding):
            assert 0.01 < delta.task.std() < 0.03
        elif isinstance(delta, AdapterLayer):
            assert delta.down.std().item() == pytest.approx(0.02, rel=0.1)
            assert delta.up.std().item() == pytest.approx(0.02, rel=0.1)
            update = delta.update(torch.randn(100, 32))
            assert 0 < update.std() < 0.05


def test_images_have_no_tokens_to_tell_the_task() -> None:
    model = ARCHITECTURES["vit"]()
    with pytest.raises(TargetNotFound, match="token-embedding"):
        inject(model, VersatileLM(size=4))
    assert registry_of(model) is None
    assert len(inject(model, VersatileLM(size=4, task_embedding=False)).deltas) == 2


def test_impossible_settings() -> None:
    with pytest.raises(ConfigError, match="size"):
        VersatileLM(size=0)
