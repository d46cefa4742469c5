"""Tiny models of every known family, one training step of them, and fused held against plain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from sidepath.core.blocks import BLOCKS
from sidepath.injection.registry import require_registry
from sidepath.injection.surgery import activate, put_in
from sidepath.injection.targets import resolve
from sidepath.methods.lora import LoRA
from tests.conftest import randomise

IDS = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(1))
FAMILIES = {
    "Llama": {"Norm": 5, "GatedMLP": 2, "Projections": 2},
    "Mistral": {"Norm": 5, "GatedMLP": 2, "Projections": 2},
    "Qwen2": {"Norm": 5, "GatedMLP": 2, "Projections": 2},
    "Qwen3": {"Norm": 9, "GatedMLP": 2, "Projections": 2},
    "SmolLM3": {"Norm": 5, "GatedMLP": 2, "Projections": 2},
    "Gemma": {"GatedMLP": 2, "Projections": 2},
    "Olmo2": {"GatedMLP": 2, "Projections": 2},
    "Phi": {"PhiMLP": 2, "Projections": 2},
    "GPT2": {"GPT2MLP": 2},
}
"""Which blocks of two layers are computed in one piece, by the name of the class that does."""


def tiny(family: str = "Llama", **options: Any) -> Any:
    """A random model of a family: two layers, 32 wide, grouped-query attention where there is."""
    torch.manual_seed(7)
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family == "GPT2":
        config: Any = transformers.GPT2Config(**sizes, n_inner=64)
        config.resid_pdrop = config.attn_pdrop = config.embd_pdrop = 0.0
        config.update(options)
        return transformers.GPT2LMHeadModel(config).train()
    if family in {"Qwen3", "Gemma"}:
        sizes["head_dim"] = 8
    sizes |= {"intermediate_size": 64, "num_key_value_heads": 4 if family == "Phi" else 2}
    config = getattr(transformers, f"{family}Config")(**sizes | options)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.train()  # type: ignore[no-any-return]


def put(model: Any, name: str = "x", *, trained: bool = True, **settings: Any) -> Any:
    config = LoRA(**{"r": 3, **settings})
    installed = put_in(model, config, name, resolve(model, config))
    if trained:
        randomise(installed.parameters(), 0.2)
    activate(model, name)
    return model


@contextmanager
def plainly(model: nn.Module) -> Iterator[None]:
    routing = require_registry(model).routing
    routing.fused = False
    try:
        yield
    finally:
        routing.fused = True


class Calls:
    """Counts the fused passes of blocks, by kind, while it is entered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: Counter[str] = Counter()
        for kind in set(BLOCKS.values()):
            name = "answer" if kind.__name__ == "Projections" else "fused"
            monkeypatch.setattr(kind, name, self._counting(kind.__name__, getattr(kind, name)))

    def _counting(self, kind: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(block: Any, *args: Any) -> Any:
            y = method(block, *args)
            if y is not None and type(block).__name__ == kind:
                self.seen[kind] += 1
            return y

        return counted


def step(model: nn.Module, ids: Tensor = IDS) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss, and its gradients by name."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_steps_equal(
    found: tuple[Tensor, dict[str, Tensor]],
    expected: tuple[Tensor, dict[str, Tensor]],
    tolerance: float,
) -> None:
    """Gradients may differ by so much of their largest number."""
    torch.testing.assert_close(found[0], expected[0], atol=tolerance, rtol=tolerance)
    assert found[1].keys() == expected[1].keys()
    assert found[1]
    for name, gradient in found[1].items():
        wanted = expected[1][name]
        largest = float(wanted.abs().max())
        assert largest > 0, name
        torch.testing.assert_close(
            gradient, wanted, rtol=0, atol=tolerance * largest, msg=partial("{}: {}".format, name)
        )


def assert_fused_is_plain(model: nn.Module, tolerance: float = 1e-4) -> None:
    torch.manual_seed(3)
    found = step(model)
    with plainly(model):
        torch.manual_seed(3)
        expected = step(model)
    assert_steps_equal(found, expected, tolerance)
