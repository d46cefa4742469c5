"""RMS normalisation with a frozen gain in one piece of autograd.

    n = x / rms(x)      y = w n      rms(x)^2 = mean(x^2) + eps
    dx = (w dy - n mean(w dy n)) / rms(x)

The forward pass does what transformers' modules do, number for number (in float32, rounded,
then times the gain); it keeps `x` and one number a row, and its output needs keeping nowhere.

Dimensions: `...` any leading, D features; the statistics are (..., 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sidepath.kernels.kept import note


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`w x / rms(x)`, differentiable once, in `x` alone. Changes nothing in place.

    `x` is in float32 or narrower, and `w` in the same.
    """
    y, scale = _RMSNorm.apply(x, weight_D, eps)  # type: ignore[no-untyped-call]
    note(y, (x, scale, weight_D), _again)
    return y  # type: ignore[no-any-return]


def _unit(x: Tensor, scale: Tensor) -> Tensor:
    """`x / rms(x)` in float32, a new tensor."""
    wide = x.float()
    return wide * scale if wide is x else wide.mul_(scale)


def _normed(x: Tensor, scale: Tensor, weight_D: Tensor) -> Tensor:
    return _unit(x, scale).to(x.dtype).mul_(weight_D)


def _again(tensors: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return _normed(tensors[0], tensors[1], tensors[2])


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        variance = x.float().pow(2).mean(-1, keepdim=True)
        scale = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, scale, weight_D)
        ctx.mark_non_differentiable(scale)
        return _normed(x, scale, weight_D), scale

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        x, scale, weight_D = ctx.saved_tensors
        d = (dy * weight_D).float()
        n = _unit(x, scale)
        mean = (d * n).mean(-1, keepdim=True)
        return d.addcmul_(n, mean, value=-1.0).mul_(scale).to(x.dtype), None, None
