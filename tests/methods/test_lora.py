"""LoRA's delta against the slow, obvious reference: the layer with `W0 + s B A` written into it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sidepath.core.views import DenseView, view_of
from sidepath.errors import ConfigError
from sidepath.methods.base import Site
from sidepath.methods.lora import LoRA, name_matches
from sidepath.methods.lowrank import LowRank
from tests.kinds import DTYPES, KINDS
from tests.methods.kit import TOLERANCE, delta_beside


def made(layer: nn.Module, **settings_: object) -> tuple[LowRank, DenseView]:
    delta, view = delta_beside(layer, LoRA(dtype="base", **settings_))  # type: ignore[arg-type]
    assert isinstance(delta, LowRank)
    return delta, view


def trained(delta: LowRank) -> LowRank:
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return delta


def reference(layer: Any, delta: LowRank, x: Tensor) -> Tensor:
    """A copy of the layer whose weight is W0 + s B A, summed in float64 and cast once."""
    view = view_of(layer)
    assert view is not None
    change = delta.scaling * (delta.B.double() @ delta.A.double())
    merged = copy.deepcopy(layer)
    merged.weight.data = view.from_matrix(view.matrix().double() + change).to(layer.weight.dtype)
    result: Tensor = merged(x)
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_delta_equals_the_merged_layer(kind: str, dtype: torch.dtype) -> None:
    layer = KINDS[kind].layer(12, 10).to(dtype)
    x = KINDS[kind].inputs(12)
    x = x.to(dtype) if x.is_floating_point() else x
    delta, view = made(layer, r=3, alpha=6.0)
    trained(delta)
    expected = reference(layer, delta, x)
    torch.testing.assert_close(
        delta(x, view), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )
    folded = copy.deepcopy(layer)
    folded.weight.data = delta.folded(view)["weight"]
    assert folded.weight.dtype == dtype
    torch.testing.assert_close(folded(x), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start", ["kaiming", "gaussian"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_delta_changes_no_bit(kind: str, start: str, dtype: torch.dtype) -> None:
    layer = KINDS[kind].layer(12, 10).to(dtype)
    x = KINDS[kind].inputs(12)
    x = x.to(dtype) if x.is_floating_point() else x
    delta, view = made(layer, r=4, start=start)
    assert torch.equal(delta(x, view), layer(x))
    assert torch.equal(delta.folded(view)["weight"], layer.get_parameter("weight"))
    assert (delta.A.abs().sum() > 0) != (delta.B.abs().sum() > 0), "exactly one factor is random"


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    width=st.integers(1, 9),
    out=st.integers(1, 9),
    rank=st.integers(1, 12),
    stabilised=st.booleans(),
)
def test_any_shape_and_rank(kind: str, width: int, out: int, rank: int, stabilised: bool) -> None:
    layer = KINDS[kind].layer(width, out).double()
    x = KINDS[kind].inputs(width)
    x = x.double() if x.is_floating_point() else x
    delta, view = made(layer, r=rank, scaling="alpha/sqrt(r)" if stabilised else "alpha/r")
    expected = reference(layer, trained(delta), x)
    torch.testing.assert_close(delta(x, view), expected, atol=1e-10, rtol=1e-10)


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4), data=st.data())
def test_parts_of_a_fused_projection(sizes: list[int], data: st.DataObject) -> None:
    rows = sum(sizes)
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    every = [(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    parts = tuple(data.draw(st.lists(st.sampled_from(every), min_size=1, unique=True)))
    layer = nn.Linear(6, rows).double()
    view = view_of(layer)
    assert view is not None
    delta: Any = LoRA(r=2, dtype="base").dense_delta(Site("c", "dense", tuple(sorted(parts))), view)
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    assert torch.equal(delta(x, view), layer(x))
    trained(delta)
    expected = layer(x).detach()
    row = 0
    for number, (start, stop) in enumerate(delta.parts):  # the obvious loop over parts
        A, B = delta.A[2 * number : 2 * number + 2], delta.B[row : row + stop - start]
        expected[..., start:stop] += delta.scaling * (x @ A.T @ B.T)
        row += stop - start
    torch.testing.assert_close(delta(x, view), expected, atol=1e-12, rtol=1e-12)
    merged = F.linear(x, delta.merged(layer.weight), layer.bias)
    torch.testing.assert_close(merged, expected, atol=1e-12, rtol=1e-12)
    outside = [column for column in range(rows) if not any(a <= column < b for a, b in parts)]
    assert torch.equal(delta(x, view)[..., outside], layer(x)[..., outside])
    assert torch.equal(delta.merged(layer.weight)[outside], layer.weight[outside])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_float64(kind: str) -> None:
    layer = KINDS[kind].layer(4, 3).double().requires_grad_(False)
    x = KINDS[kind].inputs(4)
    delta, view = made(layer, r=2)
    trained(delta)
    if not x.is_floating_point():
        check = torch.autograd.gradcheck(lambda *_: delta(x, view), tuple(delta.parameters()))
    else:
        x = x.double().requires_grad_()
        check = torch.autograd.gradcheck(lambda x, *_: delta(x, view), (x, *delta.parameters()))
    assert check


def test_the_low_rank_product_never_builds_the_matrix() -> None:
    """Counted operations: two thin products a call, 2 r (in + out) multiply-adds a row."""
    layer = nn.Linear(64, 48).requires_grad_(False)
    delta, view = made(layer, r=2)
    sizes: list[int] = []
    with _CountLinear(sizes):
        delta(torch.randn(5, 64), view)
    assert sorted(sizes) == sorted([64 * 48, 2 * 64, 2 * 48])


class _CountLinear(torch.overrides.TorchFunctionMode):
    """Collects the number of weights of every linear product."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is F.linear:
            self.sizes.append(args[1].numel())
        return func(*args, **(kwargs or {}))


def test_dropout_acts_while_training_only() -> None:
    layer = nn.Linear(16, 8).requires_grad_(False)
    view = view_of(layer)
    assert view is not None
    fresh: Any = LoRA(dropout=0.5).dense_delta(Site("l", "dense"), view)
    delta = trained(fresh)
    x = torch.randn(4, 16)
    assert not torch.equal(delta.train()(x, view), delta(x, view))
    assert torch.equal(delta.eval()(x, view), delta(x, view))


def test_float32_adapter_beside_a_bfloat16_base() -> None:
    layer = nn.Linear(16, 8).bfloat16().requires_grad_(False)
    view = view_of(layer)
    assert view is not None
    delta = LoRA().dense_delta(Site("l", "dense"), view)
    assert {parameter.dtype for parameter in delta.parameters()} == {torch.float32}
    assert delta(torch.randn(2, 16, dtype=torch.bfloat16), view).dtype == torch.bfloat16


def test_starts_follow_their_definitions() -> None:
    layer = nn.Linear(400, 30)
    kaiming, _ = made(layer, r=16)
    assert kaiming.A.abs().max() <= 1 / 400**0.5
    assert kaiming.A.std().item() == pytest.approx((1 / 400**0.5) / 3**0.5, rel=0.05)
    gaussian, _ = made(layer, r=16, start="gaussian")
    assert gaussian.A.std().item() == pytest.approx(1 / 16, rel=0.05)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", 70_000),
        ("alpha", float("nan")),
        ("alpha", 1e30),
        ("dropout", 1.0),
        ("targets", ()),
        ("bias", "some"),
        ("layers", (-1,)),
        ("rank_pattern", {"q": 0}),
        ("r", "8"),
    ],
)
def test_impossible_settings_name_the_field(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        LoRA(**{field: value})  # type: ignore[arg-type]


def test_patterns_change_rank_and_scaling() -> None:
    config = LoRA(
        r=4, alpha=8, rank_pattern={"q_proj": 2, "layers.1.*": 16}, alpha_pattern={"v": 1}
    )
    assert [config.rank_of(path) for path in ("a.k", "layers.0.q_proj", "layers.1.q_proj")] == [
        4,
        2,
        16,
    ]
    assert config.scaling_of("a.v") == 0.25
    assert LoRA(r=16, alpha=8, scaling="alpha/sqrt(r)").scaling_of("x") == 2.0


@pytest.mark.parametrize(
    ("pattern", "path", "holds"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("proj", "model.layers.0.self_attn.q_proj", False),
        ("?_proj", "model.layers.0.self_attn.q_proj", True),
        ("self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("attn.q_proj", "model.layers.0.self_attn.q_proj", False),
        ("*.layers.1.*", "model.layers.10.self_attn.q_proj", False),
        ("model.layers.[01].*", "model.layers.1.mlp.up_proj", True),
    ],
)
def test_name_matching(pattern: str, path: str, holds: bool) -> None:
    assert name_matches(pattern, path) is holds
