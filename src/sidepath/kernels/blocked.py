"""Products with a matrix laid out in blocks, as the processor multiplies few rows fastest.

BLAS reads `W0` as it lies, and for a few rows spends more on bringing it into the processor's order
than on multiplying. oneDNN, which torch is built with, keeps a copy in that order.

Dimensions: `...` any leading, O out, I in.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor

_ROWS = 8
"""Rows for which oneDNN is asked to choose the blocks. One row would get a plain order; from two to
512 rows the same blocks measured fastest."""


def lays_out(matrix: Tensor) -> bool:
    """Whether a matrix can be laid out: on an x86 processor, in float32, or in bfloat16 where the
    processor multiplies that.
    """
    known = matrix.device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64")
    if not known or not torch.backends.mkldnn.is_available() or matrix.dim() != 2:
        return False
    if matrix.dtype == torch.bfloat16:
        return bool(_onednn()._is_mkldnn_bf16_supported())
    return matrix.dtype == torch.float32


def lay_out(W_OI: Tensor) -> Tensor:
    """A copy of a matrix in blocks, opaque to everything but `product`; as many bytes."""
    laid: Tensor = _onednn()._reorder_linear_weight(W_OI.detach().contiguous(), _ROWS)
    return laid


def product(x_I: Tensor, laid_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """`W0 x + b` (..., O), a new tensor, without gradients; `x` has the matrix's dtype."""
    y_O: Tensor = _onednn()._linear_pointwise(x_I, laid_OI, bias_O, "none", [], "")
    return y_O


def _onednn() -> Any:
    return torch.ops.mkldnn
