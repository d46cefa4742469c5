"""When memory runs out: the request that wanted it may be asked again (floor 5)."""

from __future__ import annotations

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
