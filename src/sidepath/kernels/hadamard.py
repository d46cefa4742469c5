"""Fastfood: a random projection of a few numbers into many, without its matrix.

Dimensions: d numbers come in, N go out; L = 2^ceil(log2 d), at least 16; K = ceil(N / L) blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from sidepath.kernels.hashed import normal, permutation, seed_of, signs

_FACTOR = 64
"""Largest Hadamard matrix that is multiplied as one; it stays in the first cache."""
_AT_ONCE = 1 << 18
"""Numbers that are worked on at once, so that what is drawn for them stays in the cache."""


_made: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}


def _small(size: int, like: Tensor) -> Tensor:
    """Sylvester's Hadamard matrix (size, size): H_2n = [[H, H], [H, -H]]."""
    key = (size, like.dtype, like.device)
    if key in _made:
        return _made[key]
    H = torch.ones(1, 1, dtype=like.dtype, device=like.device)
    while H.shape[0] < size:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    if type(H) is Tensor:  # and no stand-in without memory
        _made[key] = H
    return H


def hadamard(x: Tensor) -> Tensor:
    """`H x` along the last dimension, whose size L is a power of two; H is not normalised.

    `H_ab = H_a ⊗ H_b`: the dimension is split into factors of at most 64 and each is multiplied
    with a small matrix, which costs L · (sum of the factors) instead of L². A new tensor.

    Errors: `ValueError` for another size.
    """
    size = x.shape[-1]
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Hadamard transform of {size} numbers: 1, 2, 4, 8, ... are possible")
    if size == 1:
        return x.clone()
    y, done = x, 1
    while done < size:
        factor = min(_FACTOR, size // done)
        H = _small(factor, x)
        if done == 1:
            y = y.reshape(-1, factor) @ H
        else:
            y = H @ y.reshape(-1, factor, done)
        done *= factor
    return y.reshape(x.shape)


@dataclass(frozen=True)
class Fastfood:
    """The map `P (N, d)`, rows of `c · H G_k Π H B` for k = 0 ... K - 1, the last block cut off.

    `B` has signs on its diagonal, `Π` is a permutation, `G_k` has N(0, 1) on its diagonal, all of
    size L and drawn from `seed` each time they are needed: nothing is kept. Each block's
    `c = scale / (sqrt(L) |G_k|)` makes the rows of P `scale / sqrt(L)` long on average: `scale =
    sqrt(L / D)` gives D such rows columns of length 1 (Le et al. 2013, "Fastfood"; Aghajanyan et
    al. 2020, section 3, who take one block for K of them).
    """

    seed: int
    d: int
    size: int
    """N."""
    total: int
    """D: of how many numbers, these N among them, the columns are to be of length 1."""

    @property
    def width(self) -> int:
        """L."""
        return max(16, 1 << (self.d - 1).bit_length())

    def __call__(self, x_d: Tensor) -> Tensor:
        """`P x` (N,), in `x`'s dtype, float32 or float64; differentiable once."""
        result: Tensor = _Product.apply(x_d, self)  # type: ignore[no-untyped-call]
        return result

    def apply(self, x_d: Tensor) -> Tensor:
        """`P x` without gradients: O(N log d) operations, O(d) numbers kept meanwhile."""
        start_L = x_d.new_zeros(self.width)
        start_L[: self.d] = x_d
        sign_L, order_L = self._first(x_d)
        spread_L = hadamard(sign_L * start_L)[order_L]
        out_N = x_d.new_empty(self.size)
        for begin, end in self._pieces(x_d):
            block_KL = hadamard(self._gauss(begin, end, x_d) * spread_L)
            out_N[begin:end] = block_KL.view(-1)[: end - begin]
        return out_N

    def transposed(self, y_N: Tensor) -> Tensor:
        """`Pᵀ y` (d,)."""
        sum_L = y_N.new_zeros(self.width)
        for begin, end in self._pieces(y_N):
            block_KL = y_N.new_zeros(-(-(end - begin) // self.width), self.width)
            block_KL.view(-1)[: end - begin] = y_N[begin:end]
            sum_L += (hadamard(block_KL) * self._gauss(begin, end, y_N)).sum(0)
        sign_L, order_L = self._first(y_N)
        back_L = torch.empty_like(sum_L)
        back_L[order_L] = sum_L
        return (sign_L * hadamard(back_L))[: self.d]

    def _pieces(self, like: Tensor) -> list[tuple[int, int]]:
        step = max(_AT_ONCE, self.width)
        # Without memory there is nothing to compute, and a plan of a large base is quick.
        end = 0 if isinstance(like, FakeTensor) else self.size
        return [(begin, min(begin + step, self.size)) for begin in range(0, end, step)]

    def _first(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """B's signs, and the order in which Π takes the numbers."""
        sign_L = signs(seed_of(self.seed, "B"), self.width, like.device).to(like.dtype)
        return sign_L, permutation(seed_of(self.seed, "Pi"), self.width, like.device)

    def _gauss(self, begin: int, end: int, like: Tensor) -> Tensor:
        """`c G_k` for the blocks that numbers `begin ... end - 1` lie in: (blocks, L)."""
        blocks = -(-(end - begin) // self.width)
        g_KL = normal(seed_of(self.seed, "G"), begin, blocks * self.width, like.device)
        g_KL = g_KL.view(blocks, self.width).to(like.dtype)
        scale = math.sqrt(self.width / self.total) / math.sqrt(self.width)
        return g_KL.mul_(scale / g_KL.norm(dim=1, keepdim=True))


class _Product(torch.autograd.Function):
    """`P x`; the backward pass draws P's parts again."""

    @staticmethod
    def forward(ctx: Any, x_d: Tensor, fastfood: Fastfood) -> Tensor:
        ctx.fastfood = fastfood
        return fastfood.apply(x_d)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:
        return ctx.fastfood.transposed(grad_N.contiguous()), None
