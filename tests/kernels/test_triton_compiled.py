"""Kernels compiled to machine code of an H100 (compute capability 9.0), which needs no GPU.

The interpreter runs what would not compile, or would compile to something slow; this looks.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from sidepath.kernels import nf4_kernels, triton_nf4, triton_routed
from sidepath.kernels.triton_load import ALWAYS, bind, interpreting
from sidepath.kernels.triton_nf4 import SINGLE, TILE
from sidepath.kernels.triton_routed import COLUMNS, OUTPUTS
from tests.kernels.interpreter import MISSING

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason=MISSING)

NF4 = ("*u8", "*fp32", "*u8", "*fp32", "*fp32", "*fp32")


def compiled(
    kernel: Any, types: dict[str, Any], constants: dict[str, Any], **options: Any
) -> tuple[str, str]:
    """A kernel's PTX and its use of resources; pointers and sizes are multiples of 16, as models'
    are, and inner strides are 1.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constexprs = {}, {}
    attributes: dict[Any, Any] = {}
    for at, name in enumerate(kernel.arg_names):
        kind = types.get(name, "i32")
        if name in constants or kind == "one":
            signature[name], constexprs[(at,)] = "constexpr", constants.get(name, 1)
            continue
        signature[name] = kind
        places = [(at, part) for part in range(len(kind))] if isinstance(kind, tuple) else [(at,)]
        if name not in {"rows", "steps", "parts"}:
            attributes |= {place: [["tt.divisibility", 16]] for place in places}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    target = GPUTarget("cuda", 90, 32)
    made = triton.compile(source, target=target, options={**ALWAYS, **options})
    return made.asm["ptx"], _resources(triton, made)


def _resources(triton: Any, made: Any) -> str:
    path = Path(triton.knobs.cache.dir) / "kernel.cubin"
    path.write_bytes(made.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


@pytest.fixture(autouse=True)
def _compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if interpreting():
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    bind(vars(triton_routed), *triton_routed.KERNELS)
    bind(vars(nf4_kernels), "tile", "single", "forward", "backward")


def dtype_of(kind: str) -> Any:
    import triton.language as tl

    return {"*fp32": tl.float32, "*bf16": tl.bfloat16, "*fp16": tl.float16}[kind]


@pytest.mark.parametrize(
    ("of_x", "of_factors", "precision", "instruction"),
    [
        ("*bf16", "*bf16", "ieee", r"mma.*bf16\.bf16"),
        ("*fp16", "*fp16", "ieee", r"mma.*f16\.f16"),
        ("*bf16", "*fp32", "tf32", r"mma.*tf32\.tf32"),
        ("*fp32", "*fp32", "ieee", r"fma\.rn\.f32"),
    ],
)
@pytest.mark.parametrize("block", [16, 64])
def test_the_routed_product(
    block: int, of_x: str, of_factors: str, precision: str, instruction: str
) -> None:
    dot = dtype_of(of_factors)
    shared = {"BLOCK_N": block, "DOT": dot, "PRECISION": precision}
    tables = {"h": "*fp32", "order": "*i32", "tiles": "*i32"}
    shrink = compiled(
        triton_routed._shrink,
        {"x": of_x, "A": of_factors, "x_i": "one", "A_i": "one", **tables},
        {"BLOCK_R": block, "BLOCK_I": COLUMNS, **shared},
    )
    expand = compiled(
        triton_routed._expand,
        {"y": of_x, "B": of_factors, "scalings": "*fp32", "y_o": "one", "B_o": "one", **tables},
        {"BLOCK_R": min(block, 32), "BLOCK_O": OUTPUTS, "ROUND": dot, **shared},
    )
    for code, resources in (shrink, expand):
        assert re.search(instruction, code)
        assert precision == "tf32" or "tf32" not in code, "float32 is multiplied in full"
        assert "STACK:0" in resources, "registers suffice"


@pytest.mark.parametrize("kind", ["*bf16", "*fp16", "*fp32"])
def test_products_with_a_4_bit_matrix(kind: str) -> None:
    dtype = dtype_of(kind)
    constants = {"PACKING": (64, 256, True, True), "ROUND": dtype, "DOT": dtype}
    tile = {"BLOCK_O": TILE[0], "BLOCK_J": TILE[1], "BLOCK_N": 32 if kind == "*fp32" else 64}
    single = {"BLOCK_O": SINGLE[0], "BLOCK_J": SINGLE[1], "BLOCK_N": 1}
    types = {"x": kind, "y": kind, "matrix": NF4, "x_i": "one"}
    back = {"dy": kind, "dx": kind, "matrix": NF4, "dy_o": "one"}
    for kernel, given, sizes in (
        (nf4_kernels.single, types, single),
        (nf4_kernels.forward, types, tile),
        (nf4_kernels.backward, back, tile),
    ):
        code, resources = compiled(kernel, given, constants | sizes, num_stages=1)
        assert "STACK:0" in resources
        assert "tf32" not in code
        vector = kernel is nf4_kernels.single or kind == "*fp32"
        assert re.search(r"fma\.rn\.f32" if vector else r"mma.*f16\.b?f16", code)


class _AbsentGPU:
    """What Triton's launch asks its driver for, where nothing is launched."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of kernels as they are launched: bound to arguments, compiled, and not run."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: launches are tested by launching")
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    names: list[str] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        names.append(self.__name__)
        assert all(size >= 1 for size in grid)
        return run(self, *args, grid=grid, warmup=True, **options)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", _AbsentGPU())
    monkeypatch.setattr(triton_nf4, "runs_on", lambda tensor: True)
    monkeypatch.setattr(triton_routed, "runs_on", lambda tensor: True)
    return names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_arguments_of_a_launch_fit(launched: list[str], dtype: torch.dtype) -> None:
    """The interpreter takes arguments its own way; this is the way of a GPU, up to the launch."""
    y, x = torch.zeros(50, 64, dtype=dtype), torch.zeros(50, 128, dtype=dtype)
    for of_factors in {dtype, torch.float32}:
        A, B = torch.zeros(12, 128, dtype=of_factors), torch.zeros(12, 64, dtype=of_factors)
        slots = torch.arange(50) % 3 - 1
        triton_routed.add_routed_(y, x, A, B, (0, 4, 12), (1.0, 2.0), slots)
        assert launched[-2:] == ["_shrink", "_expand"]
    codes, levels = torch.zeros(64 * 64, 1, dtype=torch.uint8), torch.zeros(256)
    plain = triton_nf4.Packed(codes, levels[:16], torch.zeros(128), (64, 128), 64)
    nested = triton_nf4.Packed(
        codes, levels[:16], codes[:128, 0], (64, 128), 64, levels, levels[:1], 256, levels[0]
    )
    for packed in (plain, nested):
        for rows, name in ((1, "single"), (50, "forward")):
            triton_nf4.product(x[:rows], packed)
            assert launched[-1] == name
        triton_nf4.gradient(y, packed)
        assert launched[-1] == "backward"
