"""The routed product against the slow, obvious one: a loop over rows, each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sidepath.kernels import rowplan
from sidepath.kernels.routed import (
    Factors,
    Stack,
    add_routed_,
    add_stack,
    add_stack_,
    product_dtype,
    stacked,
)
from sidepath.kernels.rowforms import Masked, RowPlan, Slices, Tiles
from sidepath.kernels.rowplan import plan_rows

TOLERANCE: dict[torch.dtype, Any] = {
    torch.float64: {"atol": 1e-10, "rtol": 1e-10},
    torch.float32: {"atol": 1e-4, "rtol": 1e-4},
    # Factors, `A x` and the sum are each rounded to 8 bits once.
    torch.bfloat16: {"atol": 5e-2, "rtol": 2e-2},
}
FORMS = {"masked": Masked, "slices": Slices, "tiles": Tiles}


def row_by_row(
    y: Tensor, x: Tensor, factors: Sequence[Factors | None], slots: Sequence[int]
) -> Tensor:
    """In float64; -1, and a slot without factors, is the base's."""
    result = []
    for row, slot in enumerate(slots):
        own = factors[slot] if slot >= 0 else None
        update: Any = 0.0
        if own is not None:
            A, B, s = own
            update = s * (x[row].double() @ A.double().T @ B.double().T)
        result.append(y[row].double() + update)
    return torch.stack(result)


def made(ranks: Sequence[int], inner: int, outer: int, dtype: torch.dtype) -> list[Factors | None]:
    scalings = (0.5, 2.0, -1.5)
    return [
        (
            torch.randn(rank, inner, dtype=dtype) / inner**0.5,
            torch.randn(outer, rank, dtype=dtype),
            scalings[number % 3],
        )
        if rank
        else None
        for number, rank in enumerate(ranks)
    ]


def preferring(form: str | None, patch: pytest.MonkeyPatch) -> None:
    """Makes one form cheap, whatever the sizes."""
    weigh = rowplan.costs

    def biased(found: rowplan.Answered) -> dict[str, float]:
        return {name: cost + (form not in (None, name)) for name, cost in weigh(found).items()}

    patch.setattr(rowplan, "costs", biased)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    preferring(request.param, monkeypatch)
    return str(request.param)


def plan_of(
    slots: Sequence[int], stack: Stack, y: Tensor, x: Tensor, tokens: int
) -> RowPlan | None:
    width = x.shape[-1] + y.shape[-1]
    return plan_rows(slots, stack.starts, like=y, tokens=tokens, width=width)


cases = st.fixed_dictionaries(
    {
        "ranks": st.lists(st.integers(0, 5), min_size=1, max_size=7),
        "same": st.booleans(),
        "order": st.sampled_from(["any", "sorted", "each", "blocks"]),
        "rows": st.integers(1, 12),
        "tokens": st.sampled_from([1, 1, 3, 8]),
        "strided": st.booleans(),
        "dtype": st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
        "seed": st.integers(0, 999),
    }
)


def slots_of(case: dict[str, Any]) -> list[int]:
    many = len(case["ranks"])
    if case["order"] == "each":
        return list(range(many))
    if case["order"] == "blocks":
        return [slot for slot in range(many) for _ in range(2)]
    found = torch.randint(-1, many, (case["rows"],)).tolist()
    return sorted(found) if case["order"] == "sorted" else found


@settings(max_examples=80, deadline=None)
@given(case=cases, prefer=st.sampled_from([None, *FORMS]))
def test_each_row_gets_its_own_product(case: dict[str, Any], prefer: str | None) -> None:
    torch.manual_seed(case["seed"])
    slots, dtype, tokens = slots_of(case), case["dtype"], case["tokens"]
    ranks = [3] * len(case["ranks"]) if case["same"] else case["ranks"]
    factors = made(ranks, 10, 7, torch.float64 if dtype == torch.float64 else torch.float32)
    y = torch.randn(len(slots), tokens, 7).to(dtype)
    x = torch.randn(len(slots), tokens, 10).to(dtype)
    if case["strided"]:
        x = torch.randn(tokens, len(slots), 20).to(dtype).transpose(0, 1)[..., ::2]
    expected, before = row_by_row(y, x, factors, slots), y.clone()
    stack = stacked(factors, dtype)
    if stack is None:
        assert not any(ranks)
        return
    with pytest.MonkeyPatch.context() as patch:
        preferring(prefer, patch)
        plan = plan_of(slots, stack, y, x, tokens)
    add_stack_(y, x, stack, plan)
    torch.testing.assert_close(y.double(), expected, **TOLERANCE[dtype])
    for row, slot in enumerate(slots):
        if slot < 0 or not ranks[slot]:
            assert torch.equal(y[row], before[row]), "a row of the base keeps its bits"


def test_each_form_can_be_chosen(form: str) -> None:
    stack = stacked(made([2, 3, 1, 2], 10, 7, torch.float32), torch.float32)
    assert stack is not None
    plan = plan_rows([0, 1, 1, -1, 3, 2, 0], stack.starts, like=torch.zeros(1), width=17)
    assert type(plan) is FORMS[form]


def test_an_even_batch_is_tiled_without_copies_of_factors_or_tokens() -> None:
    stack = stacked(made([4] * 16, 10, 7, torch.float32), torch.float32)
    assert stack is not None
    slots = [-1, *range(16), -1]
    plan = plan_rows(slots, stack.starts, like=torch.zeros(1), tokens=64, width=2000)
    assert isinstance(plan, Tiles)
    assert plan.count == 16
    assert isinstance(plan.ranks, slice)
    assert plan.rows == slice(1, 17)
    assert plan.mask_GWn1 is None
    assert plan.arrange(stack.A_SI).data_ptr() == stack.A_SI.data_ptr()


@pytest.mark.parametrize("slots", [[0, 1, 1, -1, 2, 0, 0], [0, 0, 1, 1, 2, 2, -1], [-1, -1]])
@pytest.mark.parametrize("ranks", [(2, 3, 1), (2, 2, 2), (0, 2, 1)])
def test_gradients(form: str, slots: list[int], ranks: tuple[int, ...]) -> None:
    shape = (len(slots), 2)
    factors = made(ranks, 5, 4, torch.float64)
    leaves = [
        torch.randn(*shape, 4, dtype=torch.float64),
        torch.randn(*shape, 5, dtype=torch.float64),
        *[tensor for own in factors if own is not None for tensor in own[:2]],
    ]
    for leaf in leaves:
        leaf.requires_grad_()

    def product(y: Tensor, x: Tensor, *flat: Tensor) -> Tensor:
        each = iter(flat)
        own = [None if f is None else (next(each), next(each), f[2]) for f in factors]
        stack = stacked(own, torch.float64)
        assert stack is not None
        return add_stack(y.clone(), x, stack, plan_of(slots, stack, y, x, 2))

    torch.testing.assert_close(product(*leaves), row_by_row(leaves[0], leaves[1], factors, slots))
    assert torch.autograd.gradcheck(product, leaves)


def test_gradients_reach_factors_of_another_dtype() -> None:
    factors = made([2, 2], 6, 5, torch.float32)
    leaves = [tensor.requires_grad_() for own in factors if own is not None for tensor in own[:2]]
    y, x = torch.randn(2, 3, 5).bfloat16(), torch.randn(2, 3, 6).bfloat16()
    wanted = torch.autograd.grad(row_by_row(y, x, factors, [1, 0]).sum(), leaves)
    stack = stacked(factors, torch.bfloat16)
    assert stack is not None
    found = add_stack(y.clone(), x, stack, plan_of([1, 0], stack, y, x, 3))
    got = torch.autograd.grad(found.float().sum(), leaves)
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shared_signature(dtype: torch.dtype) -> None:
    """Unscaled factors, one slot a token: as the kernels for other devices are called."""
    factors = made([3, 1, 4], 10, 7, torch.float32)
    there = [own for own in factors if own is not None]
    A_SI = torch.cat([A for A, _, _ in there])
    B_SO = torch.cat([B.T for _, B, _ in there])
    slots = [2, -1, 0, 0, 1, 2]
    y, x = torch.randn(6, 7).to(dtype), torch.randn(6, 10).to(dtype)
    expected, before = row_by_row(y, x, factors, slots), y.clone()
    scalings = tuple(s for _, _, s in there)
    add_routed_(y, x, A_SI, B_SO, (0, 3, 4, 8), scalings, torch.tensor(slots))
    torch.testing.assert_close(y.double(), expected, **TOLERANCE[dtype])
    assert torch.equal(y[1], before[1])


class Counted(TorchDispatchMode):
    """Counts the operators that do arithmetic or copy."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += not func.is_view
        return func(*args, **(kwargs or {}))


def calls(many: int, tokens: int, ranks: Sequence[int], shuffled: bool) -> int:
    stack = stacked(made(ranks, 64, 48, torch.float32), torch.float32)
    assert stack is not None
    slots = list(range(many)) + list(range(0, many, 3))
    slots = slots if shuffled else sorted(slots)
    y, x = torch.randn(len(slots), tokens, 48), torch.randn(len(slots), tokens, 64)
    plan = plan_rows(slots, stack.starts, like=y, tokens=tokens, width=1536)
    counted = Counted()
    with counted:
        add_stack_(y, x, stack, plan)
    return counted.calls


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_number_of_operators_does_not_grow_with_the_adapters(
    shuffled: bool, tokens: int, mixed: bool
) -> None:
    found = {
        many: calls(many, tokens, [(2, 8, 4)[k % 3] if mixed else 8 for k in range(many)], shuffled)
        for many in (16, 64, 128)
    }
    assert max(found.values()) <= 10, found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slots", [[1, 0, -1, 1], [0, 1], [-1, 0, 0]])
def test_few_narrow_tokens_are_multiplied_in_float32(
    form: str, dtype: torch.dtype, slots: list[int]
) -> None:
    """Rounded once: the result is the nearest number to the exact one, but for a last bit."""
    factors = made([2, 2], 10, 7, torch.float32)
    y, x = torch.randn(len(slots), 1, 7).to(dtype), torch.randn(len(slots), 1, 10).to(dtype)
    assert product_dtype(y) == torch.float32
    assert product_dtype(torch.zeros(13, 5, 7, dtype=dtype)) == dtype
    assert product_dtype(y.double()) == torch.float64
    expected, before = row_by_row(y, x, factors, slots).to(dtype), y.clone()
    stack = stacked(factors, torch.float32)
    assert stack is not None
    add_stack_(y, x, stack, plan_rows(slots, stack.starts, like=stack.A_SI, width=17))
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=torch.finfo(dtype).eps)
    for row, slot in enumerate(slots):
        if slot < 0:
            assert torch.equal(y[row], before[row])


def test_no_adapter_has_factors_here() -> None:
    assert stacked([None, None], torch.float32) is None
