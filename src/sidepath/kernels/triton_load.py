"""Triton, an optional dependency, loaded when a kernel of ours is first wanted.

A kernel is written as a plain function of its module and becomes a Triton kernel in `bind`, so that
every module imports, and reads, without Triton. In it, `tl` is `triton.language`, and a parameter
annotated `constexpr` is a constant of the compilation.

With `TRITON_INTERPRET=1` in the environment before Triton is imported, kernels run on tensors of
the CPU in Triton's interpreter: slow, and for tests.
"""

from __future__ import annotations

import importlib
import importlib.util
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from sidepath.errors import MissingExtra

ALWAYS: dict[str, Any] = {"enable_fp_fusion": True}
"""Options of every launch: `a * b + c` may round once, said because Triton 3.9 warns if unsaid."""
PROGRAMS = 264
"""Programs worth having at once: two for each of the 132 multiprocessors of an H100 or H200."""
_BINDING = Lock()


@cache
def installed() -> bool:
    """Whether Triton can be imported; does not import it."""
    return importlib.util.find_spec("triton") is not None


def bind(namespace: dict[str, Any], *kernels: str) -> None:
    """Make Triton kernels of the functions of a module (`namespace` is its `globals()`), in place.

    Errors: `MissingExtra` with the install line.
    """
    if namespace["tl"] is not None:  # set last of all
        return
    with _BINDING:
        try:
            triton = importlib.import_module("triton")
        except ImportError as error:
            raise MissingExtra(
                "this kernel needs triton, which is not installed",
                hint="pip install 'sidepath[triton]'",
            ) from error
        made = {name: triton.jit(namespace[name]) for name in kernels}
        namespace.update(made, constexpr=triton.language.constexpr, tl=triton.language)


@cache
def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter. Loads Triton."""
    return bool(importlib.import_module("triton").knobs.runtime.interpret)


def dot_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products of numbers of `dtype` are taken: the same on a GPU.

    The interpreter multiplies the bit patterns of bfloat16 (Triton's issue 11584); there it is
    float32, which holds the same numbers.
    """
    return torch.float32 if dtype == torch.bfloat16 and interpreting() else dtype


@cache
def language_dtype(dtype: torch.dtype) -> Any:
    """Triton's name for a floating dtype. Loads Triton."""
    language = importlib.import_module("triton.language")
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    return getattr(language, names[dtype])


def on(device: torch.device) -> AbstractContextManager[object]:
    """Launch on a device: Triton launches on the current one, wherever the tensors are."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def runs_on(tensor: Tensor) -> bool:
    """Whether kernels could run on a tensor: on CUDA, or anywhere in the interpreter."""
    return installed() and (tensor.is_cuda or interpreting())


def power_of_two(number: int, least: int, most: int) -> int:
    """The smallest power of two that is not below `number`, kept within [least, most]."""
    return min(most, max(least, 1 << max(0, number - 1).bit_length()))


def split(width: int, step: int, programs: int, wanted: int = PROGRAMS) -> tuple[int, int]:
    """Parts of an inner dimension, and the steps of each: more parts where programs are few, each
    of four steps at least, eight parts at most.
    """
    steps = -(-width // step)
    parts = max(1, min(8, wanted // max(1, programs), steps // 4))
    each = max(1, -(-steps // parts))
    return max(1, -(-steps // each)), each
