"""The Triton form of the routed product against a loop over tokens in float64.

On a GPU where there is one, else in Triton's interpreter (`interpreter.py`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sidepath.errors import MissingExtra, RoutingError
from sidepath.kernels.tiles import tiles_of
from sidepath.kernels.triton_load import bind, split
from sidepath.kernels.triton_routed import add_routed_, shape_class
from tests.kernels.interpreter import MISSING, device, on_triton

DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float32 beside bfloat16": (torch.bfloat16, torch.float32),
    "float32 beside float16": (torch.float16, torch.float32),
}
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 3e-3}
"""Over the greatest number there is. Twice the bound for rounding to nearest: the interpreter cuts
bfloat16 off. On a GPU float32 beside 16 bits is multiplied in TF32, which stays within it."""


@dataclasses.dataclass
class Case:
    """Inputs of one routed product."""

    y: Tensor
    x: Tensor
    A: Tensor
    B: Tensor
    starts: tuple[int, ...]
    scalings: tuple[float, ...]
    slots: Tensor

    def run(self, **options: Any) -> Tensor:
        y = self.y.clone()
        factors = self.A, self.B, self.starts, self.scalings
        add_routed_(y, self.x, *factors, self.slots, **options)
        return y

    def expected(self) -> Tensor:
        """Token by token, adapter by adapter, as the formula is written."""
        y = self.y.double()
        for token, slot in enumerate(self.slots.tolist()):
            if slot >= 0:
                rows = slice(self.starts[slot], self.starts[slot + 1])
                hidden = self.A[rows].double() @ self.x[token].double()
                y[token] += self.scalings[slot] * (self.B[rows].double().T @ hidden)
        return y

    def check(self, **options: Any) -> None:
        found, expected = self.run(**options), self.expected()
        base = self.slots == -1
        assert torch.equal(found[base], self.y[base]), "the base's rows keep their bits"
        error = (found.double() - expected).abs().max().item() if expected.numel() else 0.0
        scale = expected.abs().max().item() if expected.numel() else 0.0
        assert error <= TOLERANCES[found.dtype] * scale, (error, scale)


def case(
    dtypes: str = "float32",
    *,
    slots: list[int],
    ranks: list[int],
    width: int = 40,
    out: int = 50,
    seed: int = 0,
) -> Case:
    torch.manual_seed(seed)
    dtype, of_factors = DTYPES[dtypes]
    total, at = sum(ranks), device()
    return Case(
        torch.randn(len(slots), out, device=at).to(dtype),
        torch.randn(len(slots), width, device=at).to(dtype),
        (torch.randn(total, width, device=at) * 0.3).to(of_factors),
        (torch.randn(total, out, device=at) * 0.3).to(of_factors),
        tuple(sum(ranks[:k]) for k in range(len(ranks) + 1)),
        tuple((-1.0) ** k * (0.5 + k) for k in range(len(ranks))),
        torch.tensor(slots, dtype=torch.int64),
    )


MIXED = [0, 3, -1, 3, 0, 2, -1, 0, 3] + [0] * 20
"""Nobody asks for slot 1, slot 0 has more tokens than a tile."""


@pytest.mark.parametrize("dtypes", DTYPES)
@on_triton
def test_mixed_ranks_and_rows_of_the_base(dtypes: str) -> None:
    case(dtypes, slots=MIXED, ranks=[8, 5, 1, 33], width=130, out=150).check()


@settings(max_examples=25, deadline=None)
@given(
    dtypes=st.sampled_from(list(DTYPES)),
    slots=st.lists(st.integers(-1, 3), max_size=40),
    ranks=st.lists(st.integers(0, 20), min_size=4, max_size=4),
    width=st.integers(1, 140),
    out=st.integers(1, 140),
    block=st.sampled_from([None, 16, 32, 64]),
    seed=st.integers(0, 1000),
)
@on_triton
def test_any_shape(
    dtypes: str,
    slots: list[int],
    ranks: list[int],
    width: int,
    out: int,
    block: int | None,
    seed: int,
) -> None:
    made = case(dtypes, slots=slots, ranks=ranks, width=width, out=out, seed=seed)
    made.check(tiles=tiles_of(made.slots, made.starts, made.scalings, device(), block=block))


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16"])
@on_triton
def test_ranks_in_chunks_and_columns_in_parts(dtypes: str) -> None:
    assert split(2100, 64, 4)[0] > 1
    made = case(dtypes, slots=[0, 1, 1, -1], ranks=[100, 3], width=2100, out=20)
    made.check()
    assert torch.equal(made.run(), made.run()), "the same batch gives the same bits"


@on_triton
def test_strided_tensors() -> None:
    made = case(slots=MIXED, ranks=[4, 2, 7, 9])
    made.x = made.x.T.contiguous().T
    made.A, made.B = made.A.T.contiguous().T, made.B[:, ::2]
    room = torch.randn(len(MIXED), 2, 25, device=device())
    before = room.clone()
    made.y = before[:, 1]
    add_routed_(room[:, 1], made.x, made.A, made.B, made.starts, made.scalings, made.slots)
    assert not made.B.is_contiguous()
    torch.testing.assert_close(room[:, 1].double(), made.expected(), atol=1e-5, rtol=1e-5)
    assert torch.equal(room[:, 0], before[:, 0]), "nothing beside y is written"


@on_triton
def test_one_token_repeated_without_memory() -> None:
    made = case("bfloat16", slots=[1, 0, 1, 1], ranks=[3, 4])
    made.x = made.x[:1].expand(4, -1)
    made.check()


@on_triton
def test_exchanging_the_factors_gives_the_gradient() -> None:
    made = case(slots=MIXED, ranks=[8, 5, 1, 3])
    x = made.x.double().requires_grad_()
    dataclasses.replace(made, x=x).expected().backward(made.y.double())
    dx = torch.zeros_like(made.x)
    add_routed_(dx, made.y, made.B, made.A, made.starts, made.scalings, made.slots)
    torch.testing.assert_close(dx.double(), x.grad, atol=1e-4, rtol=1e-4)


@on_triton
def test_what_cannot_be_done_is_said_at_once() -> None:
    made = case(slots=[0, 1], ranks=[2, 2])
    wrong = dataclasses.replace(made, y=made.y[:1], A=made.A[:, 1:], B=made.B.half())
    with pytest.raises(RoutingError) as caught:
        wrong.run()
    for part in ("y is (1, 50): expected (2, 50)", "x is (2, 40): expected (2, 39)", "float16"):
        assert part in str(caught.value)
    with pytest.raises(RoutingError, match="expected 2"):
        dataclasses.replace(made, x=made.x[None]).run()
    with pytest.raises(RoutingError, match="slot 2: expected -1 to 1"):
        dataclasses.replace(made, slots=torch.tensor([0, 2])).run()
    with pytest.raises(RoutingError, match="float64"):
        dataclasses.replace(made, x=made.x.double(), y=made.y.double()).run()
    asked = dataclasses.replace(made, A=made.A.requires_grad_())
    with pytest.raises(RoutingError, match="records none"):
        asked.run()
    with torch.no_grad():
        asked.check()


def test_the_class_of_shapes_is_what_chooses_the_kernel() -> None:
    x, y = torch.zeros(40, 12), torch.zeros(40, 30)
    few = tiles_of(torch.arange(40) % 8, (0, 2, 4, 6, 8, 10, 12, 14, 20), (1.0,) * 8, x.device)
    many = tiles_of(torch.zeros(40, dtype=torch.int64), (0, 20), (1.0,), x.device)
    assert shape_class(y, x, few) == (12, 30, 16, 16)
    assert shape_class(y, x, many) == (12, 30, 64, 32)


def test_a_plain_tensor_is_refused_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without Triton too: nothing is loaded to say so."""
    monkeypatch.setitem(sys.modules, "triton", None)
    x = torch.zeros(1, 4)
    with pytest.raises(RoutingError, match="on CUDA"):
        add_routed_(x.clone(), x, x, x, (0, 1), (1.0,), torch.tensor([0]))


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MissingExtra, match=r"pip install 'sidepath\[triton\]'"):
        bind({"tl": None})


def test_no_module_loads_triton() -> None:
    names = "checked tiles triton_load triton_nf4 nf4_kernels triton_routed"
    code = (
        "import sys, importlib, torch; sys.modules['bitsandbytes'] = None;"
        f"[importlib.import_module('sidepath.kernels.' + n) for n in '{names}'.split()];"
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason=MISSING)
def test_the_interpreter_is_not_in_this_process() -> None:
    """Else the tests of what is compiled would compile nothing, and torch.compile's neither."""
    from sidepath.kernels.triton_load import interpreting

    assert not interpreting()
