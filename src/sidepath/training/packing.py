"""Several examples in one row, none of which sees another: proved on the model before step 1.

transformers reads from `position_ids` that restart (with no attention mask and no cache) where
one example ends and the next begins, and masks attention accordingly for every kind of layer. A
model that knows nothing of it would mix the examples and say nothing; so it is asked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sidepath.data.dataset import Data
from sidepath.data.example import Example
from sidepath.errors import TrainError
from sidepath.training.batching import collate_packed
from sidepath.training.loss import accepted, logits_of
from sidepath.training.trained import device_of, modes_kept

PROBED_TOKENS = 64
"""Most tokens of an example that the proof looks at."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference between packed and alone, relative to the largest logit."""


def require_packable(model: nn.Module, data: Data) -> None:
    """Raise a `TrainError` unless `model` keeps the examples of a packed row apart.

    An example Y is run behind X, behind X with other tokens, and alone. Its logits must be the
    same bits in the first two (what is masked counts exactly nothing), and the same within
    rounding in the third (its positions start anew).
    """
    if data.task != "causal":
        raise TrainError("packing is for causal rows: a row with a label is classified whole")
    if "position_ids" not in accepted(type(model).forward):
        raise TrainError(
            "packing needs a model that takes position_ids",
            found=type(model).__name__,
            hint="packing = false",
        )
    example = _short(max(data.examples[:8], key=lambda example: len(example.ids_T)))
    with modes_kept(model), torch.no_grad():
        model.eval()
        first = _behind(model, example, example)
        second = _behind(model, _other(example), example)
        alone = _logits(model, [example])
    scale = float(alone.abs().max())
    apart = float((first - alone).abs().max())
    if not torch.equal(first, second) or apart > TOLERANCE[alone.dtype] * scale:
        raise TrainError(
            "this model mixes the examples of a packed row",
            found=f"{type(model).__name__}: logits differ by {apart:.3g} of {scale:.3g} from "
            "those of the example alone",
            hint="packing = false; the lengths are sorted, so there is little padding anyway",
        )


def _short(example: Example) -> Example:
    return Example(example.ids_T[:PROBED_TOKENS], example.supervised_T[:PROBED_TOKENS], 0)


def _other(example: Example) -> Example:
    """As many tokens, in the opposite order."""
    return Example(example.ids_T[::-1].copy(), example.supervised_T, 0)


def _behind(model: nn.Module, before: Example, example: Example) -> Tensor:
    return _logits(model, [before, example])[:, len(before.ids_T) :]


def _logits(model: Any, examples: list[Example]) -> Tensor:
    batch = collate_packed([examples], range(len(examples)), 0).to(device_of(model))
    return logits_of(model, batch)
