"""RMS normalisation in one piece, against transformers' modules and a loop over rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.smollm3.modeling_smollm3 import SmolLM3RMSNorm

from sidepath.kernels.norm import rms_norm
from tests.kernels.saved import address, saved_storages

MODULES = [LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, SmolLM3RMSNorm]
EPS = 1e-6


def plain(x: Tensor, weight_D: Tensor) -> Tensor:
    """Row by row, in float64."""
    rows = x.double().reshape(-1, x.shape[-1])
    found = [row / (row.square().mean() + EPS).sqrt() * weight_D.double() for row in rows]
    return torch.stack(found).view(x.shape)


def gain(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(width).to(dtype)


def inputs(dtype: torch.dtype) -> list[Tensor]:
    """Of several shapes and sizes; a row of zeros, one of one large number, strided ones."""
    odd = torch.zeros(3, 24)
    odd[1, 5] = 1e4
    wide = torch.randn(4, 3, 48)
    found = [torch.randn(2, 5, 24) * 30, torch.randn(24) * 1e-4, torch.randn(2, 3, 4, 24), odd]
    return [x.to(dtype) for x in (*found, wide[..., ::2], wide[..., :24].transpose(0, 1))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", MODULES)
def test_the_output_has_the_modules_bits(cls: type[nn.Module], dtype: torch.dtype) -> None:
    module: Any = cls(24, eps=EPS)
    module.weight.data.normal_()
    module = module.to(dtype).requires_grad_(False)
    for x in inputs(dtype):
        x.requires_grad_()
        y = rms_norm(x, module.weight, EPS)
        assert y.dtype == dtype
        assert torch.equal(y, module(x))


def test_outputs_and_gradients_are_the_plain_forms() -> None:
    """float32 statistics are all there are, so the reference is a loop in float64."""
    for x in inputs(torch.float32)[:3]:
        x.requires_grad_()
        weight_D, d = gain(24), torch.randn(x.shape)
        y, expected = rms_norm(x, weight_D, EPS), plain(x, weight_D)
        torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
        (found,) = torch.autograd.grad(y, x, d)
        (wanted,) = torch.autograd.grad(expected, x, d.double())
        largest = float(wanted.abs().max())
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_half_precision_gradients(dtype: torch.dtype, tolerance: float) -> None:
    """`w dy` and the result are rounded: two units in the last place of the largest number."""
    x, d = torch.randn(6, 24).to(dtype).requires_grad_(), torch.randn(6, 24).to(dtype)
    weight_D = gain(24, dtype)
    (found,) = torch.autograd.grad(rms_norm(x, weight_D, EPS), x, d)
    assert found.dtype == dtype
    (wanted,) = torch.autograd.grad(plain(x, weight_D), x, d.double())
    largest = float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * largest)


def test_the_input_and_one_number_a_row_are_kept() -> None:
    x, weight_D = torch.randn(50, 24, requires_grad=True), gain(24)
    with saved_storages() as kept:
        rms_norm(x, weight_D, EPS)
    assert kept.pop(address(x)) == 50 * 24 * 4
    assert kept.pop(address(weight_D)) == 24 * 4
    assert sum(kept.values()) == 50 * 4


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(3, 24, requires_grad=True)
    y = rms_norm(x, gain(24), EPS).square().sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
