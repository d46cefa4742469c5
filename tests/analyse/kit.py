"""Updates of every shape, and the matrices they stand for."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from sidepath.analyse import Factors


def dense_update(factors: Factors) -> torch.Tensor:
    """Slow reference: ΔW built row range by row range."""
    sizes = factors.sizes or (factors.B_Or.shape[0],)
    r, start, rows = factors.r, 0, []
    for part, size in enumerate(sizes):
        B = factors.B_Or[start : start + size].double()
        A = factors.A_RI[part * r : (part + 1) * r].double()
        rows.append(factors.scaling * B @ A)
        start += size
    return torch.cat(rows)


@st.composite
def any_factors(draw: st.DrawFn, largest: int = 12) -> Factors:
    """Ranks below and above the matrix's sizes, with and without parts."""
    r = draw(st.integers(1, 6))
    columns = draw(st.integers(1, largest))
    sizes = tuple(draw(st.lists(st.integers(1, 9), min_size=0, max_size=3)))
    whole = draw(st.integers(1, largest))
    rows, parts = (sum(sizes), len(sizes)) if sizes else (whole, 1)
    scaling = draw(st.sampled_from([0.5, 2.0, -1.0]))
    return drawn(rows, columns, r, draw(st.integers(0, 2**31)), scaling, parts, sizes)


def drawn(
    rows: int,
    columns: int,
    r: int,
    seed: int,
    scaling: float = 1.0,
    parts: int = 1,
    sizes: tuple[int, ...] = (),
) -> Factors:
    """Gaussian factors."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(parts * r, columns, generator=generator, dtype=torch.float64)
    B = torch.randn(rows, r, generator=generator, dtype=torch.float64)
    return Factors(A, B, scaling, sizes)
