"""Arithmetic a token, told from the matrices, against torch's own count of real steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import sidepath
from sidepath import LoRA
from sidepath.injection.surgery import disabled, use_kernels
from sidepath.methods.base import Method
from sidepath.methods.plain import FullFineTuning, LinearProbe
from sidepath.store.plan import plan
from tests.conftest import Vision, tiny_gpt2, tiny_llama
from tests.methods.architectures import ARCHITECTURES

BATCH, TOKENS = 2, 8


def counted(model: Any, *, train: bool) -> int:
    """FLOPs of one pass over a full batch, divided by its tokens."""
    ids_BT = torch.randint(3, 64, (BATCH, TOKENS))
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        logits = model(input_ids=ids_BT, use_cache=False).logits
        if train:
            logits.sum().backward()
    total: int = counter.get_total_flops()
    assert total % (BATCH * TOKENS) == 0
    return total // (BATCH * TOKENS)


def eager(make: Callable[[], Any]) -> Any:
    """The model with attention as plain products, which torch's counter sees."""
    model: Any = make()
    model.set_attn_implementation("eager")
    return model


D, KV, R = 32, 16, 4
FIRST_LLAMA = 2 * (D * D + 2 * D * KV)
"""Queries, keys and values of the first block: nothing in front of them is trained."""
CASES: list[tuple[Callable[[], Any], Method, int]] = [
    # What the figure has too much: sisters of the first adapted layer, and the inner factors of
    # adapted layers whose input asks for no gradient (see `Flops`).
    (tiny_llama, LoRA(r=R), FIRST_LLAMA - 2 * D * D + 3 * 2 * D * R),
    (tiny_llama, LoRA(r=R, targets=("lm_head",)), 2 * D * R),
    (tiny_llama, FullFineTuning(), 0),
    (tiny_llama, LinearProbe(), 0),
    (tiny_gpt2, FullFineTuning(), 0),
    (tiny_gpt2, LoRA(r=R, targets=("c_attn",)), 2 * D * R),
]


@pytest.mark.parametrize(
    ("make", "config", "over"), CASES, ids=lambda x: getattr(x, "__name__", str(x)[:40])
)
def test_it_is_what_torch_counts(make: Callable[[], Any], config: Method, over: int) -> None:
    model = eager(make)
    found = plan(model, config, batch_size=BATCH, tokens=TOKENS, activations=False).flops
    base = counted(model, train=False)
    assert found.serving_merged == base
    sidepath.inject(model, config, "a")
    use_kernels(model, "plain")
    assert counted(model, train=False) == found.serving
    model.train()
    assert counted(model, train=True) == found.training - over
    with disabled(model):
        assert counted(model, train=False) == base


def test_training_everything_is_three_forward_passes() -> None:
    found = plan(tiny_llama(), FullFineTuning(), activations=False).flops
    assert found.training == found.training_full == 3 * found.serving
    assert found.beside == 0


def test_of_a_mixture_those_experts_count_that_a_token_is_sent_to() -> None:
    model = ARCHITECTURES["mixture"]()
    found = plan(model, LoRA(r=2), tokens=8, activations=False).flops
    layers, inner, experts, active = 2, 48, 4, 2
    attention = 2 * D * D + 2 * D * 16
    per_layer = attention + experts * D + active * 3 * D * inner
    assert found.matrices == 2 * (layers * per_layer + 64 * D)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_kind_of_model_has_figures(name: str) -> None:
    found = plan(ARCHITECTURES[name](), LoRA(r=2), tokens=8, activations=False).flops
    assert found.attention is not None
    assert found.serving_merged is not None
    assert found.matrices + found.attention == found.serving_merged < found.serving
    assert found.serving < found.training
    linear = 2 * (found.serving + found.attention)
    assert found.training <= linear + 6 * found.beside


def test_a_model_without_a_config_has_no_attention_that_is_known() -> None:
    found = plan(Vision(), LoRA(r=2, targets=("head",))).flops
    assert found.attention is None
    assert found.serving_merged == found.matrices
    assert found.beside == 2 * 2 * (8 + 5)
