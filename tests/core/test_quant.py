"""4-bit layers against the paper's construction and a plain dequantisation written out here."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sidepath.core.quant import (
    base_product,
    compute_dtype,
    dequantised,
    hold_still,
    is_packed,
    let_go,
    nearest_levels,
    packed_linear,
    plain_linear,
    product,
    require_bitsandbytes,
    state_of,
)
from sidepath.core.views import PackedView, view_of
from sidepath.errors import MissingExtra, UnsupportedModule
from sidepath.methods.base import Site
from sidepath.methods.lora import LoRA

bnb: Any = require_bitsandbytes()


def packed(
    width: int = 96, out: int = 40, *, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    """A random 4-bit layer, quantised from `dtype`."""
    return packed_linear(nn.Linear(width, out).to(dtype), **options)


def plain_dequantisation(weight: Any) -> Tensor:
    """The slow, obvious way: one number after the other, in Python's double precision."""
    state, codes = weight.quant_state, weight.data.reshape(-1).tolist()
    rows, columns = state.shape
    levels = state.code.double().tolist()
    numbers = []
    for at in range(rows * columns):
        pair = codes[at // 2]
        code = pair >> 4 if at % 2 == 0 else pair & 15
        block = at // state.blocksize
        scale = float(state.absmax[block])
        if state.nested:
            own = float(state.state2.absmax[block // state.state2.blocksize])
            level = float(state.state2.code[int(state.absmax[block])])
            scale = level * own + float(state.offset)
        numbers.append(levels[code] * scale)
    return torch.tensor(numbers, dtype=torch.float64).reshape(rows, columns)


def nf4_levels() -> Tensor:
    """The 16 levels by the paper's recipe (section 3): quantiles of N(0, 1), normalised.

    Eight quantiles on the positive side and seven on the negative, each side evenly spaced in
    probability from the outermost one to 1/2, and one zero for both.
    """
    outermost = ((1 - 1 / 30) + (1 - 1 / 32)) / 2
    probit: Callable[[Tensor], Tensor] = torch.distributions.Normal(
        torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    ).icdf
    positive = probit(torch.linspace(outermost, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -probit(torch.linspace(outermost, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([positive, negative, torch.zeros(1, dtype=torch.float64)]).sort().values
    return levels / levels.max()


def test_the_levels_are_the_papers() -> None:
    own = packed().weight.quant_state.code.double()
    assert (nf4_levels() - own).abs().max() <= 2e-7
    assert own.tolist()[7] == 0.0


def test_the_levels_are_the_recorded_ones(shared: Path) -> None:
    facts = json.loads((shared / "papers" / "qlora.json").read_text())["nf4"]["values"]
    assert (nf4_levels() - torch.tensor(facts, dtype=torch.float64)).abs().max() <= 2e-7


def test_arithmetic_of_double_quantisation() -> None:
    """Section 3: 32/64 bits of scale a number become 8/64 + 32/(64 * 256)."""
    before, after = 32 / 64, 8 / 64 + 32 / (64 * 256)
    assert before - after == pytest.approx(0.373, abs=5e-4)
    assert 4 + after == pytest.approx(4.127, abs=5e-4)
    layer = packed(1024, 256, dtype=torch.bfloat16)
    state = layer.weight.quant_state
    held = layer.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert 8 * held / (1024 * 256) == 4 + after
    single = packed(1024, 256, double=False)
    held_by_single = single.weight.nbytes + single.weight.quant_state.absmax.nbytes
    assert 8 * (held_by_single - held) / (1024 * 256) == before - after
    tables = state.code.nbytes + state.state2.code.nbytes + state.offset.nbytes
    assert tables == 4 * (16 + 256 + 1), "and tables that do not grow with the layer"


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(96, 40), (64, 32), (33, 7), (130, 3), (48, 3), (16, 4)])
def test_dequantisation_is_the_plain_one(shape: tuple[int, int], double: bool) -> None:
    layer = packed(*shape, double=double)
    expected = plain_dequantisation(layer.weight)
    assert dequantised(layer).dtype == torch.float32
    torch.testing.assert_close(dequantised(layer).double(), expected, atol=1e-7, rtol=2e-7)
    if shape[0] % 64 == 0:  # elsewhere the library's own kernel is not to be trusted
        own = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(dequantised(layer, own.dtype), own)


def test_numbers_become_the_nearest_level() -> None:
    """Without double quantisation: argmin over all 16 levels, in blocks of 64."""
    W = torch.randn(8, 64)
    levels = bnb.functional.get_4bit_type("nf4", device="cpu")
    scale = W.abs().amax(1, keepdim=True)
    nearest = ((W / scale)[..., None] - levels).abs().argmin(-1)
    assert torch.equal(nearest_levels(W, double=False), levels[nearest] * scale)


def test_nf4_is_nearer_to_a_gaussian_than_fp4() -> None:
    W = torch.randn(512, 512)
    errors = {
        kind: float((nearest_levels(W, quant_type=kind) - W).norm()) for kind in ("nf4", "fp4")
    }
    assert errors["nf4"] < 0.8 * errors["fp4"]
    assert errors["nf4"] / float(W.norm()) == pytest.approx(0.092, abs=0.004)


@pytest.mark.parametrize("source", [nn.Linear, Conv1D])
def test_packing_and_its_inverse(source: type) -> None:
    layer = nn.Linear(64, 32) if source is nn.Linear else Conv1D(32, 64)
    with torch.no_grad():
        layer.bias.normal_()
    before = copy.deepcopy(layer.state_dict())
    made: Any = packed_linear(layer, dtype=torch.float32)
    assert is_packed(made)
    assert {name: tensor.tolist() for name, tensor in layer.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in before.items()
    }
    back = plain_linear(made)
    assert type(back) is source
    assert back.state_dict().keys() == before.keys()
    x = torch.randn(3, 64)
    torch.testing.assert_close(made(x), back(x), atol=1e-6, rtol=1e-6)
    assert torch.equal(back.bias, layer.bias)  # type: ignore[arg-type]
    assert 0 < (back(x) - layer(x)).abs().max() < 0.5
    assert torch.equal(packed_linear(back, double=False).weight.data, made.weight.data)  # type: ignore[union-attr, operator, arg-type]


def test_an_unpacked_layer_is_refused() -> None:
    layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4")
    with pytest.raises(UnsupportedModule, match="not been packed yet"):
        dequantised(layer)


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match=r"pip install 'sidepath\[quant\]'"):
        packed()


# -- the view, and a delta beside it ------------------------------------------------------------


def test_a_view_knows_its_shape_without_dequantising(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = packed(dtype=torch.bfloat16)
    view = view_of(layer)
    assert isinstance(view, PackedView)
    monkeypatch.setattr("sidepath.core.quant._dequantised", None)
    assert view.shape == (40, 96)
    assert view.dtype == torch.bfloat16
    delta = LoRA(r=3, dtype="base").dense_delta(Site("l", "dense"), view)
    assert delta.A.dtype == torch.bfloat16
    assert (delta.A.shape, delta.B.shape) == ((3, 96), (40, 3))


@settings(max_examples=25, deadline=None)
@given(
    width=st.integers(1, 70),
    out=st.integers(1, 9),
    rank=st.integers(1, 6),
    double=st.booleans(),
    compute=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_delta_equals_the_merged_layer(
    width: int, out: int, rank: int, double: bool, compute: torch.dtype
) -> None:
    layer = packed_linear(nn.Linear(width, out), dtype=compute, double=double)
    view = view_of(layer)
    assert isinstance(view, PackedView)
    delta: Any = LoRA(r=rank, dtype="base").dense_delta(Site("l", "dense"), view)
    x = torch.randn(5, width).to(compute)
    base = view(x)
    assert torch.equal(delta(x, view), base), "a fresh delta changes no bit"
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    W_OI = delta.merged(view.matrix())
    assert W_OI.dtype == torch.float32
    expected = F.linear(x, view.from_matrix(W_OI), view.bias)
    tolerance = 1e-4 if compute == torch.float32 else 8e-2
    torch.testing.assert_close(delta(x, view), expected, atol=tolerance, rtol=tolerance)


def test_gradients_reach_the_delta_and_the_input_and_never_the_base() -> None:
    layer = packed(dtype=torch.float32)
    view = view_of(layer)
    assert isinstance(view, PackedView)
    delta: Any = LoRA(r=4).dense_delta(Site("l", "dense"), view)
    with torch.no_grad():
        delta.B.normal_()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(6, 96, requires_grad=True)
    y = delta(x, view)
    y.square().sum().backward()
    # The reference: a plain layer with the dequantised matrix in the compute dtype.
    twin = torch.randn(0)
    A, B, twin = (t.detach().clone().requires_grad_() for t in (delta.A, delta.B, x))
    W = dequantised(layer, torch.bfloat16)
    wanted = F.linear(twin.bfloat16(), W, layer.bias).float()
    wanted = wanted + F.linear(F.linear(twin, A), B) * delta.scaling
    wanted.square().sum().backward()
    for found, expected in ((delta.A, A), (delta.B, B), (x, twin)):
        assert found.grad is not None
        torch.testing.assert_close(found.grad, expected.grad, atol=2e-1, rtol=2e-2)
    assert layer.weight.grad is None
    assert not layer.weight.requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


# -- the base stays as it is --------------------------------------------------------------------


def test_a_forward_pass_changes_nothing() -> None:
    """In any mode and dtype, on every processor: bytes, scales, bias and its dtype."""
    layer = packed(64, 32, dtype=torch.bfloat16)
    layer.bias.data = layer.bias.data.float()  # as a user's own layer may have it
    view = view_of(layer)
    assert view is not None
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    pointer = layer.weight.data_ptr()
    for mode in (True, False, True):
        layer.train(mode)
        with torch.no_grad():
            view(torch.randn(3, 64))
            view(torch.randn(3, 64, dtype=torch.bfloat16))
        assert layer.weight.data_ptr() == pointer
        after = layer.state_dict()
        assert all(
            torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype
            for name in before
        )


@pytest.mark.parametrize("width", [16, 48, 64, 96, 130, 160, 192])
def test_every_width_is_multiplied_right(width: int) -> None:
    """Rows that begin inside a block of 64 get wrong scales from bitsandbytes 0.50 on some CPUs.

    The reference is a plain layer with the dequantised weight; forward and backward.
    """
    layer = packed(width, 32, dtype=torch.float32)
    W = plain_dequantisation(layer.weight).bfloat16()
    x = torch.randn(5, width, dtype=torch.bfloat16, requires_grad=True)
    wanted = F.linear(x, W, layer.bias)
    (expected,) = torch.autograd.grad(wanted.square().sum(), x)
    for run in (layer, lambda x: product(layer, x), copy.deepcopy(layer)):
        y = run(x)
        torch.testing.assert_close(y, wanted, atol=1e-6, rtol=1e-6)
        (found,) = torch.autograd.grad(y.square().sum(), x)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_holding_still_is_undone() -> None:
    layer = packed(96, 32)
    let_go([layer])
    free = dict(vars(layer))
    assert "forward" not in free
    assert hold_still([layer, nn.Linear(2, 2)]) == [layer]
    assert "forward" in vars(layer)
    assert hold_still([layer]) == []
    let_go([layer])
    assert vars(layer) == free


def test_a_layer_that_bitsandbytes_repacks_is_unpacked_and_held() -> None:
    """On AVX512-BF16 an eval pass rewrites the layer; elsewhere there is nothing to undo."""
    layer = packed(64, 32, dtype=torch.bfloat16)
    codes, expected = layer.weight.data.clone(), dequantised(layer)
    let_go([layer])
    layer.support_avx512bf16_for_cpu = bnb.functional.has_avx512bf16()
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(3, 64, dtype=torch.bfloat16))
    repacked = getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    assert repacked == bool(bnb.functional.has_avx512bf16())
    # Its scales have been rounded by then, which nobody can undo; its codes are what they were.
    torch.testing.assert_close(dequantised(layer), expected, atol=0.02, rtol=0.02)
    hold_still([layer])
    assert torch.equal(layer.weight.data, codes)
    assert hold_still([layer]) == []
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    W = dequantised(layer, torch.bfloat16).float()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, W.sum(0).expand(3, 64), atol=0.05, rtol=0.05)


def test_a_layer_with_a_plain_weight_multiplies_by_it() -> None:
    """What a merged layer holds: bitsandbytes' own forward pass would take it for codes."""
    layer = packed(64, 32, dtype=torch.float32)
    view = view_of(layer)
    assert isinstance(view, PackedView)
    codes = layer.weight
    layer._parameters["weight"] = view.from_matrix(view.matrix())
    x = torch.randn(3, 64)
    merged = view(x)
    layer._parameters["weight"] = codes
    assert torch.equal(merged, view(x))
    assert torch.equal(base_product(x, layer, layer), merged)


def test_the_dtype_a_layer_computes_in() -> None:
    assert compute_dtype(packed(dtype=torch.float16)) == torch.bfloat16
    free = bnb.nn.Linear4bit(64, 32, quant_type="nf4")
    free.weight = bnb.nn.Params4bit(torch.randn(32, 64).half(), quant_type="nf4", module=free)
    free = free.to("cpu")
    assert compute_dtype(free) == torch.float16, "what it was quantised from, until it has run"
    assert state_of(free.weight).dtype == torch.float16
