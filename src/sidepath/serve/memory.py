"""When memory runs out, the request that wanted it may be asked again; and free memory goes back
(floor 5).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from sidepath.errors import Overloaded

_ON_CPU = "DefaultCPUAllocator"
"""What torch's plain RuntimeError says where the CPU's memory did not suffice."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an operation failed for want of memory, on whatever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _ON_CPU in str(error)


def shed(error: BaseException) -> Overloaded:
    """The error for a request that there was no memory for. Memory that torch keeps for later is
    given back first.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    found = Overloaded(
        "there is not enough memory for this request just now",
        found=type(error).__name__,
        hint="ask again, with a shorter prompt or fewer answers; or serve with fewer --rows",
    )
    found.__cause__ = error
    return found


def trim() -> None:
    """Give memory that is free back to the system, which glibc else keeps for later: 104 MiB of 200
    adapters that had left were resident still. Nothing happens where the C library has no such
    thing.
    """
    give_back = _malloc_trim()
    if give_back is not None:
        give_back(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; Windows has no None
        return None
    return found
