"""Every number lies in the interval that its code and scale leave for it."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sidepath.core.codes import Packing, intervals
from sidepath.core.quant import require_bitsandbytes

bnb: Any = require_bitsandbytes()


@example(kind="fp4", double=True, dtype=torch.float32, scale=1.0, seed=15765)
@example(kind="nf4", double=True, dtype=torch.float32, scale=1.0, seed=15717)
@example(kind="nf4", double=True, dtype=torch.float32, scale=1.0, seed=15834)
@example(kind="nf4", double=True, dtype=torch.float32, scale=1.0, seed=15287)
@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["nf4", "fp4"]),
    double=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**31),
)
def test_every_number_lies_in_its_interval(
    kind: str, double: bool, dtype: torch.dtype, scale: float, seed: int
) -> None:
    W = torch.randn(24, 128, generator=torch.Generator().manual_seed(seed)) * scale
    codes, state = bnb.functional.quantize_4bit(
        W.to(dtype), quant_type=kind, compress_statistics=double
    )
    parts = {"weight": codes, "absmax": state.absmax, "quant_map": state.code}
    if double:
        parts |= {"nested_absmax": state.state2.absmax, "nested_quant_map": state.state2.code}
    offset = float(state.offset) if double else 0.0
    packing = Packing(kind, dtype, (24, 128), 64, 256 if double else 0, offset)
    found = intervals(packing, lambda part, at: parts[part].reshape(-1)[list(at)], range(W.numel()))
    value, least, most = found.T
    state.dtype = torch.float32
    own = bnb.functional.dequantize_4bit(codes, state).double().reshape(-1)
    torch.testing.assert_close(value, own, atol=1e-6 * scale, rtol=1e-6)
    numbers = W.double().reshape(-1)
    assert bool(((least <= numbers) & (numbers <= most)).all())
    assert bool(((least <= value) & (value <= most)).all())
    assert float((most - least).mean()) < 0.5 * float(numbers.std()), "and it says something"
