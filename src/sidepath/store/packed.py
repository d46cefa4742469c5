"""A few numbers of a tensor that bitsandbytes packed into 4 bits, in memory or on disk (floor 4).

On disk a packed weight is the bytes `X` with its parts beside it: `X.absmax`, `X.quant_map`,
`X.nested_absmax`, `X.nested_quant_map`, and a record in JSON, `X.quant_state.bitsandbytes__nf4`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sidepath.core.codes import Packing, intervals
from sidepath.core.quant import state_of, stored_transposed
from sidepath.errors import StoreError
from sidepath.store.tensors import DTYPE_NAMES, FLOATING, TensorInfo, strict_json

NAMES = re.compile(r"(NF4|FP4)-(F32|BF16|F16)-[0-9]{2,5}-[0-9]{1,5}")
"""Names of packings: the code, the dtype it was quantised from, numbers under one scale, scales
under one scale of their own (0: scales in float32)."""
BYTES = 12
"""Of one sample: its value and the bounds of its interval, in float32."""
RECORD = re.compile(r"(?P<weight>.+)\.quant_state\.bitsandbytes__(nf4|fp4)")

Where = dict[str, tuple[int, TensorInfo]]
"""Every tensor of a checkpoint: an open file and where in it the tensor lies."""
Sampled = tuple[str, tuple[int, ...], bytes]
"""A sample's dtype, shape and raw numbers."""
Positions = Callable[[int], list[int]]
_BYTE = {"U8": 1, "F32": 4, "BF16": 2, "F16": 2}
_LARGEST_RECORD = 4096


def sampled_parameter(weight: Tensor, module: nn.Module, positions: Positions) -> Sampled:
    """Samples of a packed parameter, at the positions of the matrix as its folder stores it."""
    state = state_of(weight)
    parts = {"weight": weight.data.reshape(-1).view(torch.uint8), "absmax": state.absmax}
    parts["quant_map"] = state.code
    if state.nested:
        parts |= {"nested_absmax": state.state2.absmax, "nested_quant_map": state.state2.code}

    def take(part: str, at: Sequence[int]) -> Tensor:
        tensor = parts[part].reshape(-1)
        found: Tensor = tensor[torch.tensor(list(at), dtype=torch.long, device=tensor.device)]
        return found.cpu()

    packing = Packing(
        state.quant_type,
        state.dtype,
        tuple(state.shape),
        state.blocksize,
        state.state2.blocksize if state.nested else 0,
        float(state.offset) if state.nested else 0.0,
    )
    return _sampled(packing, take, positions, transposed=stored_transposed(module))


def packed_weights(where: Mapping[str, Any]) -> set[str]:
    """The names of a checkpoint's packed weights."""
    found = (RECORD.fullmatch(name) for name in where)
    return {match["weight"] for match in found if match and match["weight"] in where}


def sampled_file(where: Where, name: str, positions: Positions) -> Sampled:
    """Samples of a packed tensor of a checkpoint. Errors: `StoreError` when its parts are amiss."""
    try:
        packing = _recorded(where, name)

        def take(part: str, at: Sequence[int]) -> Tensor:
            handle, info = where[name if part == "weight" else f"{name}.{part}"]
            raw = read_at(handle, info, at)
            dtype = torch.uint8 if info.dtype == "U8" else FLOATING[info.dtype]
            if len(raw) != len(at) * dtype.itemsize:
                raise ValueError(f"{part} ends too early")
            return torch.frombuffer(bytearray(raw), dtype=dtype)

        return _sampled(packing, take, positions, transposed=False)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise StoreError(
            "a packed tensor of the base is malformed", where=name, found=str(error)
        ) from error


def read_at(handle: int, info: TensorInfo, at: Sequence[int]) -> bytes:
    """The raw numbers of a stored tensor at some positions, one small read each."""
    size = _BYTE[info.dtype] if info.dtype in _BYTE else FLOATING[info.dtype].itemsize
    least, most = min(at, default=0), max(at, default=-1)
    if not 0 <= least <= most + 1 <= math.prod(info.shape):
        raise ValueError("a position outside of the tensor")
    if len(at) == most - least + 1 and sorted(at) == list(at):  # one after the other
        return os.pread(handle, size * len(at), info.start + size * least)
    return b"".join(os.pread(handle, size, info.start + size * one) for one in at)


def _recorded(where: Where, name: str) -> Packing:
    handle, info = next(
        where[record]
        for kind in ("nf4", "fp4")
        if (record := f"{name}.quant_state.bitsandbytes__{kind}") in where
    )
    size = math.prod(info.shape)
    if info.dtype != "U8" or size > _LARGEST_RECORD:
        raise ValueError(f"a record of {size} {info.dtype}")
    values = strict_json(os.pread(handle, size, info.start))
    nested = f"{name}.nested_absmax" in where
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPE_NAMES}
    packing = Packing(
        str(values["quant_type"]),
        dtypes[values["dtype"]],
        tuple(int(size) for size in values["shape"]),
        int(values["blocksize"]),
        int(values["nested_blocksize"]) if nested else 0,
        float(values["nested_offset"]) if nested else 0.0,
    )
    whole, codes = math.prod(packing.shape), where[name][1]
    empty = min(packing.shape, default=0) < 1
    if empty or math.prod(codes.shape) * _BYTE[codes.dtype] != (whole + 1) // 2:
        raise ValueError(f"{list(codes.shape)} bytes of codes for {list(packing.shape)} numbers")
    return packing


def _sampled(packing: Packing, take: Any, positions: Positions, *, transposed: bool) -> Sampled:
    kind = (packing.quant_type.upper(), DTYPE_NAMES[packing.dtype])
    name = f"{kind[0]}-{kind[1]}-{packing.blocksize}-{packing.nested_blocksize}"
    if not NAMES.fullmatch(name):
        raise ValueError(f"packing {name}")
    at, shape = positions(math.prod(packing.shape)), packing.shape
    if transposed:
        rows, columns = packing.shape
        at, shape = [one % rows * columns + one // rows for one in at], (columns, rows)
    numbers = intervals(packing, take, at).float()
    return name, shape, numbers.reshape(-1).contiguous().numpy().tobytes()
