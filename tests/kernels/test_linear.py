"""Linear layers with side paths in one piece, against the plain form in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sidepath.core.views import LinearView, view_of
from sidepath.kernels.dropout import Mask
from sidepath.kernels.linear import FEW, Layer, SidePathLinears, beside, forth
from tests.kernels.saved import address, saved_storages

TOLERANCE: dict[torch.dtype, Any] = {
    torch.float64: {"atol": 1e-11, "rtol": 1e-11},
    torch.float32: {"atol": 2e-5, "rtol": 2e-5},
    # `s A x`, `s dy B` and each sum are rounded to 8 bits once: some 2^-8 of the largest terms.
    torch.bfloat16: {"atol": 6e-2, "rtol": 3e-2},
    torch.float16: {"atol": 1e-2, "rtol": 5e-3},
}
IN = 12


def base(out: int, dtype: torch.dtype, *, bias: bool = True, conv1d: bool = False) -> LinearView:
    """A frozen layer, with its numbers as they are after rounding to `dtype`."""
    module: Any = Conv1D(out, IN) if conv1d else nn.Linear(IN, out, bias=bias)
    if conv1d:
        nn.init.normal_(module.weight, std=0.3)
        nn.init.normal_(module.bias)
    view = view_of(module.to(dtype).requires_grad_(False))
    assert isinstance(view, LinearView)
    return view


def factors(out: int, rank: int, dtype: torch.dtype, inner: int = IN) -> tuple[Tensor, Tensor]:
    A_RI, B_OR = torch.randn(rank, inner) / inner**0.5, torch.randn(out, rank) / rank**0.5
    return A_RI.to(dtype).requires_grad_(), B_OR.to(dtype).requires_grad_()


def layers_of(
    ranks: Sequence[int],
    dtype: torch.dtype,
    factor_dtype: torch.dtype | None = None,
    **options: Any,
) -> list[Layer]:
    """One layer a rank, of several widths and scalings; rank 0: no side path."""
    found = []
    for number, rank in enumerate(ranks):
        out = 5 + 4 * number
        A_RI, B_OR = factors(out, rank, factor_dtype or dtype) if rank else (None, None)
        layer = base(out, dtype, **options).layer(A_RI, B_OR, (0.5, 2.0, -1.5)[number])
        assert layer is not None
        found.append(layer)
    return found


def flat_factors(layers: Sequence[Layer]) -> list[Tensor | None]:
    return [tensor for layer in layers for tensor in (layer.A_RI, layer.B_OR)]


def fused(x: Tensor, layers: Sequence[Layer], mask: Mask | None = None) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...] = SidePathLinears.apply(  # type: ignore[no-untyped-call]
        x, layers, mask, *flat_factors(layers)
    )
    return result


def plain(x: Tensor, layers: Sequence[Layer], seen: Tensor | None = None) -> list[Tensor]:
    """Layer by layer in float64, `ΔW` and all."""
    ys = []
    for layer in layers:
        assert layer.W_OI is not None
        bias_O = None if layer.bias_O is None else layer.bias_O.double()
        y = F.linear(x.double(), layer.W_OI.double(), bias_O)
        if layer.A_RI is not None and layer.B_OR is not None:
            dW_OI = layer.scaling * (layer.B_OR.double() @ layer.A_RI.double())
            y = y + F.linear(x.double() if seen is None else seen.double(), dW_OI)
        ys.append(y)
    return ys


def gradients(
    ys: Sequence[Tensor], x: Tensor, layers: Sequence[Layer], weights: Sequence[Tensor]
) -> list[Tensor]:
    """Of the sum of the outputs, each number times a weight: in `x` and every factor."""
    total = torch.stack(
        [(y.double() * w.double()).sum() for y, w in zip(ys, weights, strict=True)]
    ).sum()
    wanted = [x, *(tensor for tensor in flat_factors(layers) if tensor is not None)]
    return list(torch.autograd.grad(total, wanted))


def assert_equal_to_plain(x: Tensor, layers: Sequence[Layer]) -> None:
    tolerance = TOLERANCE[x.dtype]
    ys, expected = fused(x, layers), plain(x, layers)
    for y, wanted in zip(ys, expected, strict=True):
        assert y.dtype == x.dtype
        torch.testing.assert_close(y.double(), wanted, **tolerance)
    weights = [torch.randn(y.shape).to(x.dtype) for y in ys]
    found, wanted_gradients = (gradients(z, x, layers, weights) for z in (ys, expected))
    for gradient, wanted in zip(found, wanted_gradients, strict=True):
        assert gradient.dtype == wanted.dtype
        largest = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(
            gradient.double() / largest, wanted.double() / largest, **tolerance
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"conv1d": True}], ids=str)
@pytest.mark.parametrize("ranks", [[3], [0], [2, 4], [0, 3], [3, 1, 2], [2, 0, 3]], ids=str)
def test_outputs_and_gradients_are_the_plain_forms(
    ranks: list[int], options: dict[str, Any], dtype: torch.dtype
) -> None:
    layers = layers_of(ranks, dtype, **options)
    for shape in ((7, IN), (2, 3, IN), (IN,)):
        assert_equal_to_plain(torch.randn(shape).to(dtype).requires_grad_(), layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs(dtype: torch.dtype) -> None:
    layers = layers_of([3, 0, 2], dtype)
    whole = torch.randn(6, 4, 2 * IN).to(dtype)
    for x in (whole[..., ::2], whole[..., :IN].transpose(0, 1), whole[::2, :, IN:]):
        assert not x.is_contiguous()
        assert_equal_to_plain(x.detach().requires_grad_(), layers)


def test_gradients_of_the_outputs_may_be_strided_or_absent() -> None:
    layers = layers_of([3, 2], torch.float32)
    x = torch.randn(4, 6, IN, requires_grad=True)
    wanted: Any = [x, layers[0].A_RI, layers[0].B_OR]
    pick: Callable[[tuple[Tensor, ...]], Tensor]
    for pick in (lambda ys: ys[0].transpose(0, 1)[1:].sum(), lambda ys: ys[0].mean((0, 1))[0]):
        found = torch.autograd.grad(pick(fused(x, layers)), wanted)
        expected = torch.autograd.grad(pick(plain(x, layers)), wanted)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
def test_factors_of_another_dtype_than_the_layer(factor_dtype: torch.dtype) -> None:
    """float32 factors beside bfloat16: gradients in float32, and no float32 copy of `x`."""
    layers = layers_of([3, 2], torch.bfloat16, factor_dtype)
    assert_equal_to_plain(torch.randn(40, IN).bfloat16().requires_grad_(), layers)
    if factor_dtype == torch.bfloat16:
        layers = layers_of([3, 2], torch.float32, factor_dtype)
        x = torch.randn(9, IN, requires_grad=True)
        for y, wanted in zip(fused(x, layers), plain(x, layers), strict=True):
            torch.testing.assert_close(y.double(), wanted, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("ranks", [[2], [0], [1, 0, 2]], ids=str)
def test_gradcheck(ranks: list[int]) -> None:
    layers = layers_of(ranks, torch.float64)
    own = [tensor for tensor in flat_factors(layers) if tensor is not None]

    def run(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        rest = iter(values)
        placed = [
            layer if layer.A_RI is None else layer._replace(A_RI=next(rest), B_OR=next(rest))
            for layer in layers
        ]
        return fused(x, placed)

    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *own))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.integers(1, 4), max_size=3),
    ranks=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    conv1d=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_any_shape_and_rank(
    rows: list[int], ranks: list[int], conv1d: bool, bias: bool, dtype: torch.dtype
) -> None:
    layers = layers_of(ranks, dtype, conv1d=conv1d, bias=bias)
    assert_equal_to_plain(torch.randn(*rows, IN).to(dtype).requires_grad_(), layers)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dropout_is_one_mask_forth_and_back(dtype: torch.dtype) -> None:
    layers, mask = layers_of([3, 2], dtype), Mask(0.4, 11)
    x = torch.randn(2, 5, IN, dtype=dtype, requires_grad=True)
    drops = mask.on(torch.ones(10, IN, dtype=dtype)).view(x.shape)
    assert 0 < int((drops == 0).sum()) < drops.numel()
    ys, expected = fused(x, layers, mask), plain(x, layers, x * drops)
    weights = [torch.randn_like(y) for y in ys]
    for y, wanted in zip(ys, expected, strict=True):
        torch.testing.assert_close(y.double(), wanted, **TOLERANCE[dtype])
    found, wanted_gradients = (gradients(z, x, layers, weights) for z in (ys, expected))
    torch.testing.assert_close(found, wanted_gradients, **TOLERANCE[dtype])


def kept_bytes(x: Tensor, layers: Sequence[Layer], mask: Mask | None) -> dict[int, int]:
    """Bytes of each storage that is saved for the way back, those of the layers left out."""
    with saved_storages() as kept:
        fused(x, layers, mask)
    for layer in layers:
        for tensor in layer[1:5]:
            if tensor is not None:
                kept.pop(address(tensor), None)
    return kept


@pytest.mark.parametrize("mask", [None, Mask(0.5, 3)])
def test_the_input_is_kept_once_and_no_mask(mask: Mask | None) -> None:
    layers = layers_of([3, 2, 1], torch.float32)
    x = torch.randn(50, IN, requires_grad=True)
    kept = kept_bytes(x, layers, mask)
    assert kept.pop(address(x)) == 50 * IN * 4
    assert sum(kept.values()) == 50 * (3 + 2 + 1) * 4, "`s A x` of each layer and nothing else"


def test_frozen_factors_and_inputs_get_no_gradient() -> None:
    (layer,) = layers_of([3], torch.float32)
    assert layer.A_RI is not None
    assert layer.B_OR is not None
    x = torch.randn(4, IN, requires_grad=True)
    layer.A_RI.requires_grad_(False)
    fused(x, [layer])[0].sum().backward()
    assert layer.A_RI.grad is None
    assert layer.B_OR.grad is not None
    layer.A_RI.requires_grad_()
    layer.B_OR.requires_grad_(False).grad = None
    fused(x.detach(), [layer])[0].sum().backward()
    assert layer.B_OR.grad is None
    expected = plain(x, [layer])[0].sum()
    torch.testing.assert_close(layer.A_RI.grad, *torch.autograd.grad(expected, layer.A_RI))


def test_a_second_derivative_is_refused() -> None:
    layers = layers_of([3], torch.float64)
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(fused(x, layers)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("ranks", [[3], [0, 2], [3, 1]], ids=str)
def test_the_caller_may_write_into_the_outputs(ranks: list[int]) -> None:
    layers = layers_of(ranks, torch.float32)
    x = torch.randn(2, 4, IN, requires_grad=True)
    ys, expected = fused(x, layers), [y.float() * 3 + 1 for y in plain(x, layers)]
    written = [y.mul_(3).add_(1) for y in ys]
    weights = [torch.randn_like(y) for y in written]
    torch.testing.assert_close(written, expected, **TOLERANCE[torch.float32])
    torch.testing.assert_close(
        gradients(written, x, layers, weights),
        gradients(expected, x, layers, weights),
        **TOLERANCE[torch.float32],
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, FEW, FEW + 1, 100])
@pytest.mark.parametrize("conv1d", [False, True])
def test_beside_is_forth(conv1d: bool, rows: int, dtype: torch.dtype) -> None:
    """Without gradients too: few rows and many, in every dtype, factors of this and of another."""
    x = torch.randn(rows, 1, IN).to(dtype)
    for factor_dtype in (dtype, torch.float32):
        (layer,) = layers_of([3], dtype, factor_dtype, conv1d=conv1d)
        assert layer.A_RI is not None
        assert layer.B_OR is not None
        with torch.no_grad():
            found = beside(x, layer.base, layer.A_RI, layer.B_OR, layer.scaling)
            (expected,) = forth(x, [layer]).ys
        assert found.dtype == dtype
        assert found.shape == expected.shape
        for y in (found, expected):
            torch.testing.assert_close(y.double(), plain(x, [layer])[0], **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 64)], ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"conv1d": True}], ids=str)
def test_a_zero_B_leaves_the_bases_bits(
    options: dict[str, bool], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    for width, out in ((IN, 7), (64, 48), (96, 256)):
        module: Any = nn.Linear(width, out, bias=options.get("bias", True))
        if "conv1d" in options:
            module = Conv1D(out, width)
            nn.init.normal_(module.bias)
        view = view_of(module.to(dtype).requires_grad_(False))
        assert isinstance(view, LinearView)
        A_RI, B_OR = factors(out, 8, torch.float32, width)
        B_OR.data.zero_()
        x = torch.randn(*shape, width).to(dtype)
        expected, layer = module(x), view.layer(A_RI, B_OR, 2.0)
        assert layer is not None
        with torch.no_grad():
            assert torch.equal(beside(x, view, A_RI, B_OR, 2.0), expected)
        assert torch.equal(fused(x, [layer])[0], expected)
