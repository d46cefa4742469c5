"""One layer of every kind, with an input for it: what the property tests run over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Kind:
    """A layer made for sizes (in, out), and an input for it."""

    layer: Callable[[int, int], nn.Module]
    inputs: Callable[[int], Tensor]


def _floats(*shape: int) -> Callable[[int], Tensor]:
    return lambda width: torch.randn(2, *(width if size < 0 else size for size in shape))


def _grouped(width: int, out: int) -> nn.Module:
    return nn.Conv2d(2 * width, 2 * out, (3, 2), stride=2, padding=1, dilation=2, groups=2)


def _images(width: int) -> Tensor:
    return torch.randn(2, width, 5, 6)


KINDS = {
    "linear": Kind(nn.Linear, _floats(4, -1)),
    "linear without bias": Kind(lambda i, o: nn.Linear(i, o, bias=False), _floats(-1)),
    "conv1d of transformers": Kind(lambda i, o: Conv1D(o, i), _floats(4, -1)),
    "embedding": Kind(nn.Embedding, lambda width: torch.randint(0, width, (2, 5))),
    "conv1d": Kind(
        lambda i, o: nn.Conv1d(i, o, 3, padding=2, padding_mode="circular"), _floats(-1, 6)
    ),
    "conv2d": Kind(lambda i, o: nn.Conv2d(i, o, (3, 1), stride=(2, 1)), _images),
    "conv2d in groups": Kind(_grouped, lambda width: _images(2 * width)),
    "conv3d": Kind(lambda i, o: nn.Conv3d(i, o, 2), lambda width: torch.randn(2, width, 3, 3, 3)),
}
