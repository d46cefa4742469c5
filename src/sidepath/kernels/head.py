"""The head's product and the cross-entropy in chunks of rows: the logits never exist at once.

    L = sum_n (1 - e) (lse_n - z_n[t_n]) + e (lse_n - mean_v z_n[v]),   z_n = W h_n + b
    dL/dz = p - (1 - e) 1[t] - e / V,                                    dL/dh = W^T dL/dz

with lse the log of the sum of exponentials and e the label smoothing. The gradient of a chunk
is made while its logits are there and in their place, so that each product runs once.

Dimensions: N rows, C of a chunk, K of a block of it, D features, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 512
"""Rows of one product with the head: enough for it to be efficient."""
BLOCK_BYTES = 2 * 2**20
"""Bytes of the float32 logits that are worked on at a time: they stay in a processor's cache."""


def head_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    *,
    smoothing: float = 0.0,
    rows: int = ROWS,
) -> Tensor:
    """The summed cross-entropy of `softmax(W h + b)`, in nats, float32 (float64 for float64).

    Differentiable once, in `hidden` alone: the head is frozen. The logits are rounded to
    `hidden`'s dtype as the head itself would; `rows` of them exist at a time.
    """
    loss: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, bias_V, targets_N, smoothing, rows
    )
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        smoothing: float,
        rows: int,
    ) -> Tensor:
        needed = ctx.needs_input_grad[0]
        dh_ND = torch.empty_like(hidden_ND) if needed else None
        losses = []
        for start in range(0, len(hidden_ND), rows):
            own = slice(start, start + rows)
            logits_CV = F.linear(hidden_ND[own], weight_VD, bias_V)
            losses_C, sums_C1 = _to_gradient_(logits_CV, targets_N[own], smoothing)
            losses.append(losses_C.sum())
            if dh_ND is not None:
                torch.mm(logits_CV, weight_VD, out=dh_ND[own])
                dh_ND[own] /= sums_C1
        if dh_ND is not None:
            ctx.save_for_backward(dh_ND)
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        (dh_ND,) = ctx.saved_tensors
        return dh_ND * dloss.to(dh_ND.dtype), None, None, None, None, None


def _to_gradient_(
    logits_CV: Tensor, targets_C: Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Each row's loss, and the sum of its exponentials by which `dL/dz` is still to be divided;
    `dL/dz` times that sum takes the place of the logits. A few rows at a time.
    """
    wide = torch.promote_types(logits_CV.dtype, torch.float32)
    vocabulary = logits_CV.shape[1]
    step = max(1, BLOCK_BYTES // (4 * vocabulary))
    losses, sums = [], []
    for start in range(0, len(logits_CV), step):
        block_KV, at_K1 = logits_CV[start : start + step], targets_C[start : start + step, None]
        largest_K1 = block_KV.amax(1, keepdim=True).to(wide)
        z_K1 = block_KV.gather(1, at_K1).to(wide)
        loss_K1 = largest_K1 - z_K1
        if smoothing:
            mean_K1 = block_KV.mean(1, keepdim=True, dtype=wide)
            loss_K1 = largest_K1 - (1.0 - smoothing) * z_K1 - smoothing * mean_K1
        p_KV = torch.sub(block_KV, largest_K1).exp_()
        sum_K1 = p_KV.sum(1, keepdim=True)
        losses.append(loss_K1 + sum_K1.log())
        sums.append(sum_K1)
        if smoothing:
            p_KV.sub_(sum_K1 * (smoothing / vocabulary))
        p_KV.scatter_add_(1, at_K1, sum_K1 * (smoothing - 1.0))
        block_KV.copy_(p_KV)
    return torch.cat(losses), torch.cat(sums)
