"""The chunked loss of a frozen head, against torch's own cross-entropy of whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sidepath.kernels import head
from sidepath.kernels.head import head_loss

WIDE, VOCABULARY = 10, 33


def material(
    rows: int, dtype: torch.dtype, *, bias: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    hidden_ND = torch.randn(rows, WIDE).to(dtype).requires_grad_()
    weight_VD = torch.randn(VOCABULARY, WIDE).to(dtype)
    bias_V = torch.randn(VOCABULARY).to(dtype) if bias else None
    return hidden_ND, weight_VD, bias_V, torch.randint(0, VOCABULARY, (rows,))


def plain(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    smoothing: float = 0.0,
) -> Tensor:
    """Whole logits, in float64."""
    bias = None if bias_V is None else bias_V.double()
    logits_NV = F.linear(hidden_ND.double(), weight_VD.double(), bias)
    return F.cross_entropy(logits_NV, targets_N, reduction="sum", label_smoothing=smoothing)


@pytest.mark.parametrize("rows", [1, 7, 100], ids=lambda rows: f"chunks of {rows}")
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, 20])
def test_loss_and_gradient_are_torchs(count: int, bias: bool, smoothing: float, rows: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        args = material(count, dtype, bias=bias)
        found = head_loss(*args, smoothing=smoothing, rows=rows)
        expected = plain(*args, smoothing)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
        (dh,) = torch.autograd.grad(found * 0.3, args[0])
        (wanted,) = torch.autograd.grad(expected * 0.3, args[0])
        torch.testing.assert_close(dh, wanted, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)], ids=str
)
def test_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    """The loss is in float32, of logits rounded as the head's own; the gradient is rounded."""
    args = material(20, dtype, bias=True)
    found = head_loss(*args, smoothing=0.1, rows=6)
    assert found.dtype == torch.float32
    logits_NV = F.linear(*(tensor.detach() for tensor in args[:3] if tensor is not None))
    expected = F.cross_entropy(logits_NV.double(), args[3], reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    (dh,) = torch.autograd.grad(found, args[0])
    (wanted,) = torch.autograd.grad(plain(*args, 0.1), args[0])
    assert dh.dtype == dtype
    largest = float(wanted.abs().max())
    torch.testing.assert_close(dh, wanted, rtol=0, atol=tolerance * largest)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.floats(0, 1), st.integers(1, 9))
def test_any_number_of_rows_chunks_and_blocks(
    count: int, rows: int, smoothing: float, block: int
) -> None:
    args = material(count, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(head.BLOCK_BYTES, "cpu", 4 * VOCABULARY * block)
        found = head_loss(*args, smoothing=smoothing, rows=rows)
    (dh,) = torch.autograd.grad(found, args[0])
    expected = plain(*args, smoothing)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(dh, *torch.autograd.grad(expected, args[0]))


def test_gradcheck() -> None:
    hidden_ND, weight_VD, bias_V, targets_N = material(5, torch.float64, bias=True)

    def run(hidden: Tensor) -> Tensor:
        return head_loss(hidden, weight_VD, bias_V, targets_N, smoothing=0.2, rows=2)

    assert torch.autograd.gradcheck(run, (hidden_ND,))


def test_no_rows_are_no_loss() -> None:
    args = material(0, torch.float32)
    loss = head_loss(*args)
    assert loss.dtype == torch.float32
    assert loss.item() == 0
    loss.backward()
    assert args[0].grad is not None
    assert args[0].grad.shape == (0, WIDE)
    assert head_loss(*material(0, torch.bfloat16)).dtype == torch.float32


def test_logits_of_minus_infinity_are_no_nan() -> None:
    """A bias may rule words out; the loss is finite where the target is not among them."""
    hidden_ND, weight_VD, bias_V, targets_N = material(6, torch.float32, bias=True)
    assert bias_V is not None
    bias_V[:20] = -torch.inf
    targets_N.clamp_(20, VOCABULARY - 1)
    found = head_loss(hidden_ND, weight_VD, bias_V, targets_N, rows=4)
    expected = plain(hidden_ND, weight_VD, bias_V, targets_N)
    torch.testing.assert_close(found.double(), expected)
    (dh,) = torch.autograd.grad(found, hidden_ND)
    (wanted,) = torch.autograd.grad(expected, hidden_ND)
    torch.testing.assert_close(dh, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(dtype: torch.dtype) -> None:
    """Far beyond what an exponential can hold, on both sides."""
    hidden_ND, weight_VD, _, targets_N = material(8, dtype)
    with torch.no_grad():
        hidden_ND.mul_(1e4)
    found = head_loss(hidden_ND, weight_VD, None, targets_N, smoothing=0.1, rows=3)
    logits_NV = F.linear(hidden_ND.detach(), weight_VD).double()
    expected = F.cross_entropy(logits_NV, targets_N, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-2)
    (dh,) = torch.autograd.grad(found, hidden_ND)
    assert torch.isfinite(dh).all()


class Sizes(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_never_exist_at_once(dtype: torch.dtype) -> None:
    args, rows = material(200, dtype), 70
    with Sizes() as seen:  # type: ignore[no-untyped-call]
        head_loss(*args, rows=rows).backward()
    assert seen.largest == max(rows * VOCABULARY, 200 * WIDE)
    with Sizes() as seen:  # type: ignore[no-untyped-call]
        plain(*args).backward()
    assert seen.largest == 200 * VOCABULARY, "the watch can see them"


def test_without_gradients_none_is_made() -> None:
    args = material(20, torch.float32)
    with torch.no_grad():
        quiet = head_loss(*args, rows=6)
    assert not quiet.requires_grad
    assert torch.equal(quiet, head_loss(*args, rows=6).detach())


def test_a_second_derivative_is_refused() -> None:
    args = material(4, torch.float64)
    (first,) = torch.autograd.grad(head_loss(*args).square(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
