from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sidepath.kernels.lowrank import add_of_rows

SCALINGS = [0.5, 2.0, -1.5]


def row_by_row(
    y: Tensor, x: Tensor, owners: list[int], As: list[Tensor], Bs: list[Tensor]
) -> Tensor:
    """The slow, obvious reference: every row by itself; -1 is the base's."""
    rows = []
    for row, owner in enumerate(owners):
        update = 0.0 if owner < 0 else SCALINGS[owner] * (x[row] @ As[owner].T @ Bs[owner].T)
        rows.append(y[row] + update)
    return torch.stack(rows)


def factors_of(owners: list[int], sizes: list[int]) -> Tensor:
    factors = torch.zeros(len(owners), sum(sizes), dtype=torch.float64)
    for row, owner in enumerate(owners):
        if owner >= 0:
            start = sum(sizes[:owner])
            factors[row, start : start + sizes[owner]] = SCALINGS[owner]
    return factors


@settings(max_examples=30, deadline=None)
@given(
    owners=st.lists(st.integers(-1, 2), min_size=1, max_size=6),
    sizes=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    middle=st.sampled_from([(), (1,), (4,), (2, 3)]),
    seed=st.integers(0, 1000),
)
def test_every_row_gets_its_own_product_and_gradient(
    owners: list[int], sizes: list[int], middle: tuple[int, ...], seed: int
) -> None:
    torch.manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    y, x = leaf(len(owners), *middle, 7), leaf(len(owners), *middle, 6)
    As, Bs = [leaf(size, 6) for size in sizes], [leaf(7, size) for size in sizes]
    leaves = [y, x, *As, *Bs]
    expected = row_by_row(y, x, owners, As, Bs)
    found = add_of_rows(y, x, factors_of(owners, sizes), As, Bs)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, direction, allow_unused=True)
    got = torch.autograd.grad(found, leaves, direction)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other)


def test_the_output_has_the_bases_dtype() -> None:
    y, x = torch.randn(3, 5, 8, dtype=torch.bfloat16), torch.randn(3, 5, 6, dtype=torch.bfloat16)
    As, Bs = [torch.randn(2, 6), torch.randn(2, 6)], [torch.randn(8, 2), torch.randn(8, 2)]
    out = add_of_rows(y, x, factors_of([1, 0, -1], [2, 2]).float(), As, Bs)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out[2], y[2]), "a row of the base keeps its bits"
