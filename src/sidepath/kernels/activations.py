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
    back_: Callable[[Tensor, Tensor], Tensor]
    """`d f'(x)` of `(d, x)`, in the place of `d`."""


def _gelu_new(x: Tensor) -> Tensor:
    """GPT-2's `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`, in that order of rounding."""
    inner = torch.pow(x, 3.0).mul_(0.044715).add_(x).mul_(math.sqrt(2.0 / math.pi))
    return inner.tanh_().add_(1.0).mul_(0.5 * x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _silu_back_(d: Tensor, x: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten.silu_backward.grad_input(d, x, grad_input=d)
    return result


def _gelu_tanh_back_(d: Tensor, x: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten.gelu_backward.grad_input(d, x, approximate="tanh", grad_input=d)
    return result


def _gelu_back_(d: Tensor, x: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten.gelu_backward.grad_input(d, x, grad_input=d)
    return result


SILU = Activation(F.silu, _silu_back_)
GELU = Activation(F.gelu, _gelu_back_)
GELU_TANH = Activation(_gelu_tanh, _gelu_tanh_back_)
GELU_NEW = Activation(_gelu_new, _gelu_tanh_back_)
