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
BLOCK_BYTES = {"cpu": 2 * 2**20, "cuda": 64 * 2**20}
"""Bytes of the float32 logits that are worked on at a time: on a CPU they stay in its cache; on a
GPU each operator is a launch, some 20 us of the host's, so that there are few of them."""


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
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        losses = [torch.zeros((), dtype=wide, device=hidden_ND.device)]  # of no rows, too
        for start in range(0, len(hidden_ND), rows):
            own = slice(start, start + rows)
            logits_CV = F.linear(hidden_ND[own], weight_VD, bias_V)
            losses.append(_to_gradient_(logits_CV, targets_N[own], smoothing))
            if dh_ND is not None:
                torch.mm(logits_CV, weight_VD, out=dh_ND[own])
            del logits_CV  # before the next ones are made
        if dh_ND is not None:
            ctx.save_for_backward(dh_ND)
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        (dh_ND,) = ctx.saved_tensors
        return dh_ND * dloss.to(dh_ND.dtype), None, None, None, None, None


def _to_gradient_(logits_CV: Tensor, targets_C: Tensor, smoothing: float) -> Tensor:
    """The summed loss of some rows; `dL/dz` takes the place of the logits, a few rows at a time."""
    dtype = torch.promote_types(logits_CV.dtype, torch.float32)
    vocabulary = logits_CV.shape[1]
    room = BLOCK_BYTES.get(logits_CV.device.type, BLOCK_BYTES["cuda"])
    step = max(1, room // (4 * vocabulary))
    losses = []
    for start in range(0, len(logits_CV), step):
        block_KV, at_K1 = logits_CV[start : start + step], targets_C[start : start + step, None]
        z_K1 = block_KV.gather(1, at_K1).to(dtype)
        largest_K1 = block_KV.amax(1, keepdim=True).to(dtype)
        mean_K1 = block_KV.mean(1, keepdim=True, dtype=dtype) if smoothing else z_K1
        # Widened first: of two dtypes torch makes a copy in the wider one all the same.
        p_KV = block_KV.to(dtype).sub_(largest_K1).exp_()
        sum_K1 = p_KV.sum(1, keepdim=True)
        seen_K1 = (1.0 - smoothing) * z_K1 + smoothing * mean_K1
        losses.append((largest_K1 + sum_K1.log() - seen_K1).sum())
        p_KV.div_(sum_K1)
        if smoothing:
            p_KV.sub_(smoothing / vocabulary)
        p_KV.scatter_add_(1, at_K1, torch.full_like(sum_K1, smoothing - 1.0))
        if p_KV is not block_KV:
            block_KV.copy_(p_KV)
    return torch.stack(losses).sum()
