"""Adapters with random factors on tiny bases, saved as folders of ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sidepath.convert.portable import Base, Options
from sidepath.methods.lora import LoRA
from sidepath.store.adapter import inject
from sidepath.store.peft_format import CONFIG, WEIGHTS

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "alpha": 8, "targets": ("all-linear",)},
    "one layer": {"r": 2, "alpha": 3, "targets": ("q_proj",), "layers": (1,)},
    "rank pattern": {"r": 4, "alpha": 8, "targets": ATTENTION, "rank_pattern": {"q_proj": 2}},
    "alpha pattern": {"r": 4, "alpha": 8, "targets": ATTENTION, "alpha_pattern": {"v_proj": 32}},
    "rank-stabilised": {"r": 4, "alpha": 5, "targets": ATTENTION, "scaling": "alpha/sqrt(r)"},
    "bfloat16": {"r": 3, "alpha": 7, "targets": ATTENTION, "dtype": "bfloat16"},
    "float16": {"r": 3, "alpha": 7, "targets": ATTENTION, "dtype": "float16"},
    "dropout": {"r": 3, "alpha": 7, "targets": ("down_proj",), "dropout": 0.25},
}
"""Adapters that every format can say, by what is special about them."""
SPECIAL: dict[str, dict[str, Any]] = {
    "DoRA": {"r": 3, "alpha": 6, "targets": ATTENTION, "dora": True},
    "embedding and head": {"r": 2, "alpha": 4, "targets": ("embed_tokens", "lm_head", "q_proj")},
    "biases": {"r": 2, "alpha": 4, "targets": ATTENTION, "bias": "lora"},
    "every bias": {"r": 2, "alpha": 4, "targets": ("q_proj",), "bias": "all"},
    "trained whole": {"r": 2, "alpha": 4, "targets": ("q_proj",), "train_whole": ("lm_head",)},
}
"""Adapters that some formats have no place for."""


def save_base(model: nn.Module, folder: Path) -> Base:
    """A model as a base on disk."""
    model.save_pretrained(folder)  # type: ignore[operator]
    model.config._name_or_path = str(folder)  # type: ignore[union-attr]
    return Base(model, folder)


def randomise(adapter: Any) -> None:
    """Numbers in every trained tensor, none of them round."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(parameter + noise.to(parameter.dtype))


def made(make: Callable[[], Any], folder: Path, **settings: Any) -> tuple[Path, nn.Module]:
    """An adapter's folder, and the adapted model that it was saved from."""
    model = make()
    adapter = inject(model, LoRA(**settings), "made")
    randomise(adapter)
    adapter.save(folder, record={"seed": 7})
    return folder, model


def options(base: Base | None = None, **more: Any) -> Options:
    """Options with the base, if any."""
    return Options(base=base, **more)


def same_adapter(one: Path, other: Path) -> None:
    """Assert that two folders of ours hold the same adapter, to the bit; records aside."""
    assert (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()
    assert json.loads((one / CONFIG).read_text()) == json.loads((other / CONFIG).read_text())
    manifests = [json.loads((folder / "sidepath.json").read_text()) for folder in (one, other)]
    for manifest in manifests:
        for key in ("record", "files", "digest"):
            manifest.pop(key)
    assert manifests[0] == manifests[1]
