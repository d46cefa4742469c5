"""What tests of several methods share: counts on large models, and rows with trained positions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from sidepath.core.delta import Delta
from sidepath.core.views import DenseView, view_of
from sidepath.data.example import Example
from sidepath.injection.surgery import use_kernels
from sidepath.methods.base import Method, Site
from sidepath.store.adapter import inject
from sidepath.training.batching import Batch, collate
from sidepath.training.loss import batch_loss

TOLERANCE: dict[torch.dtype, Any] = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}
LENGTHS = (6, 3, 5)


def delta_beside(layer: nn.Module, config: Method) -> tuple[Delta, DenseView]:
    """A fresh delta beside one layer, and the layer's view."""
    view = view_of(layer)
    assert view is not None
    return config.dense_delta(Site("layer", "dense"), view), view


def trained(config: Any, method: Method, cls: Any) -> int:
    """How many parameters a method trains on a model of any size: nothing has memory."""
    with torch.device("meta"):
        model = cls(config)
    return sum(parameter.numel() for parameter in inject(model, method).parameters())


def gpt2(width: int, layers: int) -> Any:
    return transformers.GPT2Config(n_embd=width, n_layer=layers, n_head=16, vocab_size=8)


def bert(width: int, layers: int) -> Any:
    return transformers.BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=16, vocab_size=8,
        intermediate_size=4 * width,
    )  # fmt: skip


def published(shared: Path, table: str, method: str) -> int:
    """The count behind a published number that reproduces."""
    rows_ = json.loads((shared / "papers" / "recompute_report.json").read_text())
    found = {
        row["computed"]
        for row in rows_["rows"]
        if row["table"] == table
        and f"{row['method']} ".startswith(method)
        and row["status"] == "EXACT"
    }
    assert len(found) == 1, (table, method, found)
    return int(found.pop())


def rows() -> list[Tensor]:
    """Token ids of three rows."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 64, (length,), generator=generator) for length in LENGTHS]


def left_padded() -> dict[str, Tensor]:
    """The rows as one batch, padded on the left."""
    width = max(LENGTHS)
    ids = [nn.functional.pad(ids_T, (width - len(ids_T), 0)) for ids_T in rows()]
    mask = [nn.functional.pad(torch.ones_like(i), (width - len(i), 0)) for i in rows()]
    return {"input_ids": torch.stack(ids), "attention_mask": torch.stack(mask)}


def supervised() -> Batch:
    """The rows as a training batch; all but the first two tokens of each are targets."""
    examples = [
        Example(ids_T.numpy().astype(np.int32), np.arange(len(ids_T)) > 1, line=at)
        for at, ids_T in enumerate(rows())
    ]
    return collate(examples, range(3), 0)


NEW = 6
"""Tokens that are generated behind each row."""
GENERATION: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


def generated(model: Any, cached: bool) -> list[list[int]]:
    """The tokens that `rows`, padded into one batch, are continued with."""
    model.generation_config.eos_token_id = None
    batch = left_padded()
    out = model.generate(**batch, use_cache=cached, **GENERATION)
    return [one[batch["input_ids"].shape[1] :].tolist() for one in out]


def beams(model: Any) -> list[Tensor]:
    """What three beams find for the first row, with a cache and without."""
    ids_BT = rows()[0][None]
    options = {"input_ids": ids_BT, "num_beams": 3, **GENERATION}
    return [model.generate(use_cache=use_cache, **options) for use_cache in (True, False)]


def require_one_loss(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Tensor:
    """The fused head and the plain one give the same loss, which is returned, and gradients."""
    parameters, losses, gradients = list(parameters), [], []
    for kernels in ("fused", "plain"):
        use_kernels(model, kernels)  # type: ignore[arg-type]
        for parameter in parameters:
            parameter.grad = None
        loss = batch_loss(model, supervised())
        loss.backward()
        losses.append(loss.detach())
        gradients.append([parameter.grad for parameter in parameters])
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    return losses[0]
