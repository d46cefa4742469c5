"""Fastfood against its matrix, written out factor by factor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sidepath.kernels import hadamard as module
from sidepath.kernels.hadamard import Fastfood, hadamard
from sidepath.kernels.hashed import normal, permutation, seed_of, signs


def sylvester(size: int) -> Tensor:
    """H by its definition: H_ij = (-1)^(number of ones in i & j)."""
    return torch.tensor(
        [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)],
        dtype=torch.float64,
    )


def written_out(map_: Fastfood) -> Tensor:
    """P (N, d), every factor a matrix."""
    L = map_.width
    H = sylvester(L)
    B = torch.diag(signs(seed_of(map_.seed, "B"), L).double())
    order = permutation(seed_of(map_.seed, "Pi"), L)
    Pi = torch.zeros(L, L, dtype=torch.float64)
    Pi[torch.arange(L), order] = 1.0
    blocks = []
    for k in range(-(-map_.size // L)):
        g = normal(seed_of(map_.seed, "G"), k * L, L).double()
        whole = H @ torch.diag(g) @ Pi @ H @ B
        # Divided as in Aghajanyan et al.'s code: sqrt(L ΣG²) · sqrt(D / L).
        blocks.append(whole / ((L * g.square().sum()).sqrt() * (map_.total / L) ** 0.5))
    return torch.cat(blocks)[: map_.size, : map_.d]


MAPS = [
    Fastfood(11, d=1, size=5, total=5),
    Fastfood(12, d=20, size=7, total=300),
    Fastfood(13, d=64, size=64, total=64),
    Fastfood(14, d=100, size=1000, total=4000),
]
MAP_NAMES = [f"{m.d} to {m.size}" for m in MAPS]


@pytest.mark.parametrize("size", [1, 2, 16, 64, 128, 512, 4096])
def test_the_fast_transform_is_the_matrix_s(size: int) -> None:
    x = torch.randn(3, size, dtype=torch.float64)
    if size <= 512:
        torch.testing.assert_close(hadamard(x), x @ sylvester(size))
    torch.testing.assert_close(hadamard(hadamard(x)), size * x)


@pytest.mark.parametrize("size", [0, 3, 48])
def test_other_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="1, 2, 4, 8"):
        hadamard(torch.zeros(2, size))


@pytest.mark.parametrize("piece", [1 << 18, 128], ids=["at once", "in pieces"])
@pytest.mark.parametrize("map_", MAPS, ids=MAP_NAMES)
def test_the_product_and_its_gradient_are_the_matrix_s(
    map_: Fastfood, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", piece)
    P = written_out(map_)
    x = torch.randn(map_.d, dtype=torch.float64, requires_grad=True)
    x_plain = x.detach().clone().requires_grad_(True)
    y, expected = map_(x), P @ x_plain
    # The factors are drawn in float32 and normalised in float64 here as there.
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-12)
    weights = torch.randn(map_.size, dtype=torch.float64)
    (y.square() * weights).sum().backward()
    (expected.square() * weights).sum().backward()
    torch.testing.assert_close(x.grad, x_plain.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("map_", MAPS, ids=MAP_NAMES)
def test_gradients_by_differences(map_: Fastfood) -> None:
    x = torch.randn(map_.d, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(map_, (x,))


def test_lengths_are_kept_and_columns_stand_apart() -> None:
    """Li et al., 2018: columns of P of length 1, nearly at right angles where D is large."""
    P = written_out(Fastfood(3, d=64, size=1 << 13, total=1 << 13))
    gram = P.T @ P
    torch.testing.assert_close(gram.diagonal(), torch.ones(64).double(), atol=0.15, rtol=0)
    assert (gram - torch.diag(gram.diagonal())).abs().max() < 0.15
    assert torch.linalg.matrix_rank(P) == 64


def test_float32_is_close_and_zero_is_zero() -> None:
    map_ = MAPS[-1]
    x = torch.randn(map_.d)
    torch.testing.assert_close(map_(x).double(), written_out(map_) @ x.double(), atol=1e-5, rtol=0)
    assert not map_(torch.zeros(map_.d)).any()


def test_it_follows_from_the_seed_alone() -> None:
    x = torch.randn(100)
    state = torch.get_rng_state()
    assert torch.equal(MAPS[-1](x), Fastfood(14, 100, 1000, 4000)(x))
    assert not torch.allclose(MAPS[-1](x), Fastfood(15, 100, 1000, 4000)(x), atol=1e-2)
    assert torch.equal(torch.get_rng_state(), state)
