"""The memory told from a few blocks is that of all of them, or it is not told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sidepath import LoRA
from sidepath.injection.targets import resolve
from sidepath.methods.base import Method
from sidepath.methods.plain import BitFit, FullFineTuning, LinearProbe
from sidepath.store import memory, stacks
from sidepath.store.memory import Shape, Twin
from sidepath.store.stacks import Counted, equal_blocks, extended
from tests.conftest import tiny_llama

BLOCKS = 7


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=BLOCKS, n_head=2, vocab_size=64, n_positions=64)
    return GPT2LMHeadModel(config).eval()


def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=32, num_hidden_layers=BLOCKS, num_attention_heads=2, intermediate_size=64,
        vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def llama() -> Any:
    return tiny_llama(layers=BLOCKS)


CASES: list[tuple[Callable[[], Any], Method]] = [
    (llama, LoRA(r=4)),
    (llama, LoRA(r=2, targets=("q_proj", "v_proj", "lm_head"))),
    (llama, FullFineTuning()),
    (gpt2, LoRA(r=4, targets=("c_attn:q,v",))),
    (gpt2, BitFit()),
    (bert, LoRA(r=4, train_whole=("classifier",))),
    (bert, LinearProbe()),
]


@pytest.mark.parametrize(("make", "config"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_it_is_that_of_all_blocks(
    make: Callable[[], Any],
    config: Method,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape, model = Shape(3, 40), make().to("meta")
    sites = resolve(model, config)
    twin = Twin(model, config, sites)
    assert twin._stack is None, "too few blocks by themselves"
    full = twin.memory(shape, checkpointing=True)
    monkeypatch.setattr(stacks, "MANY", BLOCKS)
    told: list[object] = []

    def watched(counts: list[Counted], blocks: int) -> tuple[int, int] | None:
        told.append(extended(counts, blocks))
        return told[-1]  # type: ignore[return-value]

    monkeypatch.setattr(memory, "extended", watched)
    short = Twin(model, config, sites)
    assert short._stack is not None
    assert short._stack[1] == BLOCKS
    assert short.memory(shape, checkpointing=True) == full
    assert len(told) == 2, "with checkpointing and without"
    if not isinstance(config, FullFineTuning):
        assert None not in told, "and it was told, not reckoned in full"


@pytest.mark.parametrize(
    "config",
    [
        LoRA(r=2, layers=(0, 3)),
        LoRA(r=2, rank_pattern={"layers.3.mlp.up_proj": 4}),
        FullFineTuning(top=2),
    ],
    ids=str,
)
def test_blocks_that_are_adapted_in_different_ways_are_not_equal(
    config: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "MANY", BLOCKS)
    model = llama().to("meta")
    twin = Twin(model, config, resolve(model, config))
    assert twin._stack is None


def test_blocks_of_another_size_or_kind_are_not_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "MANY", BLOCKS)
    changes: list[Callable[[Any], object]] = [
        lambda layer: setattr(layer.mlp, "up_proj", nn.Linear(32, 65)),
        lambda layer: setattr(layer.mlp, "act_fn", nn.ReLU()),
        lambda layer: setattr(layer, "attention_type", "sliding_attention"),
        lambda layer: layer.to(torch.bfloat16),
    ]
    model = llama()
    assert equal_blocks(model, [], {}) == ("model.layers", BLOCKS)
    for change in changes:
        model = llama()
        change(model.get_submodule("model.layers.4"))
        assert equal_blocks(model, [], {}) is None


def counts(*found: tuple[int, int, int]) -> list[Counted]:
    return [Counted(n, *each) for n, each in zip((2, 3, 4), found, strict=True)]


def test_it_goes_on_only_as_a_peak_can() -> None:
    # 10 a block kept and 1 trained: the peak at the start of the backward pass grows by 9.
    assert extended(counts((30, 20, 2), (39, 30, 3), (48, 40, 4)), 10) == (102, 100)
    # More trained than kept: the end of the backward pass has the peak, however many.
    assert extended(counts((30, 20, 40), (30, 30, 60), (30, 40, 80)), 10) == (30, 100)
    # Flat so far, but the other place grows and will be the peak some day.
    assert extended(counts((30, 20, 2), (30, 30, 3), (30, 40, 4)), 10) is None
    # Not a line.
    assert extended(counts((30, 20, 2), (39, 30, 3), (49, 40, 4)), 10) is None
