"""Merged tensors are made one at a time, and the model they are made of is left as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sidepath.injection.merging import merge
from sidepath.injection.registry import require_registry
from sidepath.merging.folded import Folded, first_names
from sidepath.methods import METHODS
from sidepath.methods.base import Method
from sidepath.methods.lora import LoRA
from sidepath.store.adapter import inject
from sidepath.store.peft_format import base_state
from sidepath.store.sums import add_up
from tests.conftest import MODELS, randomise, tiny_llama

CONFIGS: dict[str, tuple[str, Method]] = {
    "lora": ("llama", LoRA(r=2)),
    "parts": ("gpt2", LoRA(r=2, targets=("c_attn:q,v",), bias="all")),
    "convolutions": ("vision", LoRA(r=2, targets=("stem", "grouped"))),
    "embedding": ("gpt2", LoRA(r=2, targets=("wpe",))),
    "dora": ("llama", LoRA(r=2, dora=True)),
    "whole": ("bert", LoRA(r=2, bias="lora", train_whole=("classifier", "pooler"))),
    "vera": ("llama", METHODS["vera"](r=4)),  # type: ignore[call-arg]
    "bitfit": ("bert", METHODS["bitfit"]()),
    "full": ("llama", METHODS["full"]()),
    "intrinsic": ("gpt2", METHODS["intrinsic"](d=30)),  # type: ignore[call-arg]
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_touched_is_known_before_it_is_made(name: str) -> None:
    kind, config = CONFIGS[name]
    model = MODELS[kind][0]()
    for delta, path in ((d, p) for p, d in inject(model, config, "x").deltas.items()):
        view = require_registry(model).sides[path].view
        assert set(delta.folded(view)) == delta.touches(view)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_each_tensor_is_what_merging_in_memory_gives(name: str, dtype: torch.dtype) -> None:
    kind, config = CONFIGS[name]
    model: Any = MODELS[kind][0]().to(dtype)
    randomise(inject(model, config, "x").parameters())
    before = {full: (id(held), held.clone()) for full, held in base_state(model).items()}
    folded = Folded(model, "x", {full: held.dtype for full, (_, held) in before.items()})
    first = first_names(model)
    found = {full: folded.tensor(first[full]).clone() for full in before}
    now = base_state(model)
    assert {full: id(held) for full, held in now.items()} == {n: k for n, (k, _) in before.items()}
    assert all(torch.equal(held, now[full]) for full, (_, held) in before.items())
    merge(model, "x")
    for full, held in base_state(model).items():
        assert torch.equal(found[full], held), full


def test_another_dtype_is_rounded_to_from_the_exact_sum() -> None:
    model: Any = tiny_llama().bfloat16()
    for name in "ab":
        randomise(inject(model, LoRA(r=2, targets=("up_proj",)), name).parameters())
    add_up(model, ["a", "b"])
    full = "model.layers.1.mlp.up_proj.weight"
    W_OI = model.get_parameter(full)
    exact = W_OI.float()
    for name in "ab":
        delta: Any = require_registry(model).adapters[name].deltas[full.removesuffix(".weight")]
        exact = torch.addmm(exact, delta.B, delta.A, alpha=delta.scaling)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        folded = Folded(model, "together", {full: dtype})
        assert torch.equal(folded.tensor(full), exact.to(dtype))
    assert model.get_parameter(full) is W_OI
    assert W_OI.dtype == torch.bfloat16
