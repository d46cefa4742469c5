"""Activations and their derivatives as single passes over memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """An element-wise function `f` and its derivative."""

    forward: Callable[[Tensor], Tensor]
    """`f(x)`, a new tensor: number for number what the module it stands for gives."""
    back: Callable[[Tensor, Tensor], Tensor]
    """`d f'(x)` of `(d, x)`, a new tensor."""


def _gelu_new(x: Tensor) -> Tensor:
    """GPT-2's `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`, in that order of rounding."""
    inner = torch.pow(x, 3.0).mul_(0.044715).add_(x).mul_(math.sqrt(2.0 / math.pi))
    return inner.tanh_().add_(1.0).mul_(0.5 * x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_tanh_back(d: Tensor, x: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten.gelu_backward(d, x, approximate="tanh")
    return result


def _gelu_back(d: Tensor, x: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten.gelu_backward(d, x)
    return result


SILU = Activation(F.silu, torch.ops.aten.silu_backward)
GELU = Activation(F.gelu, _gelu_back)
GELU_TANH = Activation(_gelu_tanh, _gelu_tanh_back)
GELU_NEW = Activation(_gelu_new, _gelu_tanh_back)
