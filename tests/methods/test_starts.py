"""Starts that look at the weight: the nearest factors, LoftQ's alternation, PiSSA and OLoRA."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sidepath.core.quant import nearest_levels
from sidepath.core.views import DenseView, view_of
from sidepath.errors import ConfigError
from sidepath.injection.merging import merge, unmerge
from sidepath.injection.registry import registry_of
from sidepath.injection.surgery import route
from sidepath.methods.base import Site
from sidepath.methods.lora import LoRA
from sidepath.methods.rebased import Rebased
from sidepath.methods.starts import best_factors, first_factors, loftq
from sidepath.store.adapter import inject, load
from sidepath.training.trained import trained_of
from tests.conftest import MODELS, outputs, randomise, tiny_gpt2, tiny_llama
from tests.kinds import DTYPES, KINDS
from tests.methods.kit import delta_beside


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), rank=st.integers(1, 12))
def test_the_factors_are_the_nearest_of_their_rank(rows: int, columns: int, rank: int) -> None:
    M = torch.randn(rows, columns, dtype=torch.float64)
    A, B = best_factors(M, rank)
    assert (A.shape, B.shape) == ((rank, columns), (rows, rank))
    singular = torch.linalg.svdvals(M)
    left = (M - B @ A).norm()
    torch.testing.assert_close(left, singular[rank:].norm(), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(A @ A.T, B.T @ B, atol=1e-9, rtol=1e-9)


def test_each_iteration_is_nearer() -> None:
    """Algorithm 1: quantise what the factors leave, then fit the factors to what that lost."""
    W = torch.randn(96, 128) @ torch.diag(torch.linspace(2, 0.1, 128))
    errors = [float((nearest_levels(W) - W).norm())]
    for iterations in (1, 2, 5):
        A, B, Q = loftq(W, nearest_levels, r=8, iterations=iterations)
        errors.append(float((Q + B @ A - W).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.95 * errors[0]


def test_over_a_fixed_base_the_first_iteration_is_the_last() -> None:
    W = torch.randn(32, 64)
    Q = nearest_levels(W)
    once, more = (loftq(W, lambda _: Q, 4, iterations) for iterations in (1, 4))
    assert all(torch.equal(one, other) for one, other in zip(once, more, strict=True))


@pytest.mark.parametrize("parts", [(), ((0, 8), (16, 24))])
@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)"])
def test_a_delta_starts_at_a_matrix(parts: tuple[tuple[int, int], ...], scaling: str) -> None:
    layer = nn.Linear(20, 24).double()
    view = view_of(layer)
    assert view is not None
    config = LoRA(r=3, alpha=5, scaling=scaling, dtype="base", start="loftq")  # type: ignore[arg-type]
    delta: Any = config.dense_delta(Site("c", "dense", parts), view)
    M = torch.randn(24, 20, dtype=torch.float64)
    delta.start_at_(M)
    found = delta.matrix(24, torch.float64)
    for start, stop in parts or ((0, 24),):
        A, B = best_factors(M[start:stop], 3)
        torch.testing.assert_close(found[start:stop], B @ A, atol=1e-9, rtol=1e-9)
    outside = [row for row in range(24) if parts and not any(a <= row < b for a, b in parts)]
    assert not found[outside].any()


STARTS = ("pissa", "olora")


def rebased(layer: nn.Module, start: str, **options: object) -> tuple[Rebased, DenseView]:
    delta, view = delta_beside(layer, LoRA(start=start, **options))  # type: ignore[arg-type]
    assert isinstance(delta, Rebased)
    return delta, view


@pytest.mark.parametrize("r", [3, 10, 14])
def test_pissa_leaves_the_best_remainder(r: int) -> None:
    """`‖W0 - s B A‖² = Σ_{i>r} σ_i²`, as the paper's residual; nothing where r is the full rank."""
    layer = nn.Linear(12, 10).double()
    delta, view = rebased(layer, "pissa", r=r, alpha=5, dtype="base")
    W0 = view.matrix()
    left = (W0 - delta.scaling * (delta.B @ delta.A)).square().sum()
    expected = torch.linalg.svdvals(W0)[r:].square().sum()
    torch.testing.assert_close(left.detach(), expected.detach(), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("r", [3, 10, 14])
def test_olora_starts_orthonormal_at_the_first_of_qr(r: int) -> None:
    layer = nn.Linear(12, 10).double()
    delta, view = rebased(layer, "olora", r=r, alpha=2 * r, dtype="base")
    W0, kept = view.matrix().detach(), min(r, 10)
    Q = delta.B[:, :kept].detach()
    torch.testing.assert_close(Q.T @ Q, torch.eye(kept, dtype=torch.float64))
    product = delta.scaling * (delta.B @ delta.A).detach()
    # With all but the first r columns of Q taken away, W0's first r columns are whole.
    torch.testing.assert_close(product[:, :kept], W0[:, :kept])
    A, B = first_factors(W0, r)
    torch.testing.assert_close(product, B @ A)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_such_a_start_changes_no_bit_and_is_a_low_rank_delta_of_2r(
    kind: str, start: str, dtype: torch.dtype
) -> None:
    layer, x = KINDS[kind].layer(12, 10).to(dtype), KINDS[kind].inputs(12)
    x = x.to(dtype) if x.is_floating_point() else x
    delta, view = rebased(layer, start, r=3)
    assert delta.A.any()
    assert delta.B.any()
    assert torch.equal(delta(x, view), layer(x))
    randomise(delta.parameters(), 0.3)
    tensors = delta.tensors()
    assert tensors["A"].shape[0] == tensors["B"].shape[1] == 6
    close = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 8e-2, torch.float16: 1e-2}
    folded: Any = copy.deepcopy(layer)
    folded.weight.data = delta.folded(view)["weight"]
    torch.testing.assert_close(delta(x, view), folded(x), atol=close[dtype], rtol=close[dtype])
    W = view.matrix().double() + delta.scaling * (
        delta.B.double() @ delta.A.double() - delta.B0.double() @ delta.A0.double()
    )
    torch.testing.assert_close(view.as_matrix(folded.weight), W.to(dtype), atol=close[dtype],
                               rtol=close[dtype])  # fmt: skip


@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)"])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_it_is_saved_as_plain_lora_of_twice_the_rank(
    name: str, start: str, scaling: str, tmp_path: Path
) -> None:
    factory, inputs = MODELS[name]
    model, x = factory(), inputs()
    again = copy.deepcopy(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = outputs(model, x)
    targets = {"gpt2": ("c_attn:q,v", "c_fc"), "vision": ("stem", "grouped", "head")}.get(
        name, ("all-linear",)
    )
    config = LoRA(
        r=2, alpha=3, start=start, scaling=scaling,  # type: ignore[arg-type]
        targets=targets,
        rank_pattern={} if name == "vision" else {"*.1.*": 3},
    )  # fmt: skip
    adapter = inject(model, config, "a")
    assert torch.equal(outputs(model, x), expected), "the base's outputs, to the bit"
    randomise(adapter.parameters())
    expected = outputs(model, x)
    folder = adapter.save(tmp_path / "a")
    plain = load(again, folder, "b")
    assert isinstance(plain.config, LoRA)
    assert (plain.config.start, plain.config.r) == ("kaiming", 4)
    assert not any(isinstance(delta, Rebased) for delta in plain.deltas.values())
    torch.testing.assert_close(outputs(again, x), expected, atol=1e-5, rtol=1e-5)
    for mine in (model, again):
        state = mine.state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("start", STARTS)
def test_trained_it_keeps_its_start_and_moves_the_rest(start: str) -> None:
    model, ids = tiny_llama(), torch.randint(3, 64, (2, 7))
    config = LoRA(r=2, start=start, dropout=0.2)  # type: ignore[arg-type]
    inject(model, config, "a")
    model.train()
    trained = trained_of(model, "a")
    assert {name.rpartition(".")[2] for name in trained.parameters} == {"A", "B"}
    assert {name.rpartition(".")[2] for name in trained.tensors} == {"A", "B", "A0", "B0"}
    held = trained.snapshot()
    optimizer = torch.optim.SGD(trained.parameters.values(), lr=0.1)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    for name, tensor in trained.tensors.items():
        assert torch.equal(tensor, held[name]) == name.endswith("0"), name


@pytest.mark.parametrize("start", STARTS)
def test_it_merges_routes_and_is_taken_out(start: str) -> None:
    model, ids = tiny_llama(), torch.randint(3, 64, (2, 7))
    base = outputs(model, ids)
    adapter = inject(model, LoRA(r=2, start=start), "a")  # type: ignore[arg-type]
    randomise(adapter.parameters())
    apart = outputs(model, ids)
    with route(model, [None, "a"]):
        routed = outputs(model, ids)
    assert torch.equal(routed[0], base[0])
    torch.testing.assert_close(routed[1], apart[1])
    merge(model, "a")
    torch.testing.assert_close(outputs(model, ids), apart, atol=1e-5, rtol=1e-5)
    unmerge(model)
    assert torch.equal(outputs(model, ids), apart)


def test_half_of_the_largest_rank_is_the_largest_for_them() -> None:
    for start in STARTS:
        with pytest.raises(ConfigError, match="r, alpha"):
            LoRA(r=40_000, alpha=9e5, start=start)  # type: ignore[arg-type]
    LoRA(r=40_000, alpha=9e5)


def test_each_part_of_a_fused_projection_starts_at_its_own_rows() -> None:
    model = tiny_gpt2()
    adapter = inject(model, LoRA(r=4, start="pissa", targets=("c_attn:q,v",)), "a")
    for path, delta in adapter.deltas.items():
        assert isinstance(delta, Rebased)
        W0 = registry_of(model).sides[path].view.matrix()  # type: ignore[union-attr]
        for number, (start, stop) in enumerate(delta.parts):
            A, B = best_factors(W0[start:stop] / delta.scaling, 4)
            torch.testing.assert_close(delta.A[4 * number : 4 * number + 4], A)
            torch.testing.assert_close(delta.B[32 * number : 32 * number + 32], B)
