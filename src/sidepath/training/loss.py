"""The loss of a batch, as a sum, so that the caller decides what to divide by.

Dimensions: B rows, T tokens, V vocabulary, K kept positions at the end, N targets, C classes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sidepath.errors import TrainError
from sidepath.injection.head import fused_head
from sidepath.training.batching import IGNORED, Batch


def batch_loss(model: nn.Module, batch: Batch, *, smoothing: float = 0.0) -> Tensor:
    """The summed cross-entropy of a batch's targets, in nats; divide by `batch.weight`.

        L = sum over targets of -(1 - e) log p(target) - e/V sum_v log p(v)

    with e = `smoothing`. Only positions whose next token is a target reach the softmax, which
    runs in float32 (float64 for a float64 model). Changes nothing.
    """
    head = fused_head(model) if batch.labels_B is None else None
    if head is None:
        return loss_and_logits(model, batch, smoothing=smoothing)[0]
    hidden_BTD = head.hidden(**inputs_of(head.body, batch))
    rows_BK, targets_N = _targets(batch)
    kept = rows_BK.shape[1] + 1
    return head.loss(hidden_BTD[:, -kept:-1][rows_BK], targets_N, smoothing)


def loss_and_logits(
    model: nn.Module, batch: Batch, *, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The summed loss, and the logits it came from: (N, V), or (B, C) for classification."""
    logits, targets = logits_and_targets(model, batch)
    return cross_entropy(logits, targets, smoothing), logits


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """The summed cross-entropy of (N, V) logits, in float32 or wider."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)


def logits_and_targets(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (N, V) and targets (N) of a batch, row by row; (B, C) and (B) for classification."""
    if batch.labels_B is not None:
        logits_BC = logits_of(model, batch)
        _require_dimensions(logits_BC, 2, "labelled rows need a sequence classification model")
        return logits_BC, batch.labels_B
    rows_BK, targets_N = _targets(batch)
    kept = rows_BK.shape[1] + 1
    logits = logits_of(model, batch, kept)
    _require_dimensions(logits, 3, "rows without labels need a causal language model")
    return logits[:, -kept:-1][rows_BK], targets_N


def _targets(batch: Batch) -> tuple[Tensor, Tensor]:
    """Of the last positions but one, K of them: which see a target next, and the targets."""
    targets_BK = batch.targets_BT[:, 1 + batch.first_target :]
    wanted_BK = targets_BK != IGNORED
    return wanted_BK, targets_BK[wanted_BK]


def _require_dimensions(logits: Tensor, wanted: int, what: str) -> None:
    if logits.dim() != wanted:
        raise TrainError(
            what, found=f"logits of shape {tuple(logits.shape)}", expected=f"{wanted} dimensions"
        )


def logits_of(model: nn.Module, batch: Batch, kept: int | None = None) -> Tensor:
    """What the model says of a batch: (B, T, V), or of the last `kept` positions only where it
    can leave the others out; (B, C) for classification.
    """
    options = inputs_of(model, batch)
    if kept is not None and "logits_to_keep" in accepted(type(model).forward):
        options["logits_to_keep"] = kept
    logits: Tensor = model(**options).logits
    return logits


def inputs_of(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What a model is called with for a batch."""
    inputs: dict[str, Any] = {
        "input_ids": batch.ids_BT,
        "attention_mask": batch.attention_mask_BT,
    }
    if "use_cache" in accepted(type(model).forward):
        inputs["use_cache"] = False
    if batch.positions_BT is not None:
        inputs["position_ids"] = batch.positions_BT
    return inputs


@functools.cache
def accepted(forward: Callable[..., Any]) -> frozenset[str]:
    """Names of the arguments that a model class's `forward` takes."""
    return frozenset(inspect.signature(forward).parameters)
