"""A fast kernel is trusted once it agreed with the plain path, on the inputs at hand.

The first time that a kernel meets a dtype and a class of shapes, both ways are run and compared.
Where they agree the kernel is used from then on (where speed is in question: if it was faster as
well). If it disagrees or raises, it is barred in all its forms for the rest of the process, with
one `KernelNotice`: a kernel that was wrong once is not asked again.

The caller decides that there is a kernel at all (see `eligible`) and hands both ways over as
functions, so that nothing here knows what they do.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from sidepath.errors import KernelNotice, SidepathError
from sidepath.kernels.triton_load import installed

TOLERANCES = {torch.float32: 2e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""How far two ways may differ, over the largest number of a row: some roundings of the dtype (of
TF32 for float32, which a user may have switched on for the plain path). A term or a row too many,
or a wrong scale, is far beyond."""
FAINT = 1e-2
"""Rows that are this faint beside the strongest one are measured as if they were not fainter."""

Make = Callable[[], Tensor]
Add = Callable[[Tensor], None]
Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Key:
    """What one trial vouches for."""

    kernel: str
    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int, ...]
    """The class of shapes: whatever chooses another form of the kernel, or another speed."""


class Verdict(Enum):
    """What a trial came to; a kernel that failed is barred, and needs none."""

    FAST = "agrees with the plain path"
    SLOWER = "agrees with the plain path and is slower"


def eligible(tensor: Tensor) -> bool:
    """Whether a Triton kernel may stand in for the plain path: on CUDA, with Triton installed, and
    not while `torch.compile` traces, which makes kernels of its own.
    """
    return tensor.is_cuda and installed() and not torch.compiler.is_compiling()


def cuda_seconds(run: Callable[[], object]) -> float:
    """The median time of a call on the current CUDA stream, of five after two to warm up."""
    event: Any = torch.cuda.Event
    times: list[float] = []
    for number in range(7):
        start, stop = event(enable_timing=True), event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        if number >= 2:
            times.append(start.elapsed_time(stop) / 1000)
    return statistics.median(times)


class Trials:
    """The verdicts on fast kernels. Threads may try a kernel twice, and come to the same."""

    def __init__(self, timer: Timer = cuda_seconds) -> None:
        self.verdicts: dict[Key, Verdict] = {}
        self.barred: dict[str, str] = {}
        """Why, by kernel."""
        self._blank: dict[Key, int] = {}
        """Uses of which the trials so far could say nothing."""
        self._timer = timer

    def run(self, key: Key, fast: Make, plain: Make, *, timed: bool = False) -> Tensor:
        """The result of `fast()` if it is trusted, else of `plain()`; tried first if need be.

        `timed`: the kernel must also have been the faster of the two. Errors: those of the plain
        path, of ours (a `SidepathError` is the input's fault), and memory that ran out.
        """
        if self._trusted(key):
            result = self._guarded(key, fast)
            return plain() if result is None else result
        answer = plain()
        if self._due(key):
            self._try(key, fast, plain, answer, timed)
        return answer

    def add_(self, key: Key, y: Tensor, fast: Add, plain: Add, *, timed: bool = False) -> None:
        """`fast(y)` if it is trusted, else `plain(y)`: both add something to `y`, in place.

        In a trial they add to zeros, so that what they add is compared and not `y`, beside which
        it may be small. A kernel must raise before it writes. Errors: as `run`.
        """

        def onto_zeros(add: Add) -> Tensor:
            added = torch.zeros_like(y)
            add(added)
            return added

        if self._trusted(key):
            if self._guarded(key, lambda: _after(fast, y)) is None:
                plain(y)
            return
        if self._due(key):
            self._try(key, lambda: onto_zeros(fast), lambda: onto_zeros(plain), None, timed)
        plain(y)

    def _trusted(self, key: Key) -> bool:
        return key.kernel not in self.barred and self.verdicts.get(key) is Verdict.FAST

    def _due(self, key: Key) -> bool:
        """Whether to try now. A trial that could say nothing is repeated after twice as many uses:
        an adapter whose update is still zero must not cost three products each time.
        """
        if key.kernel in self.barred or key in self.verdicts or _capturing():
            return False
        uses = self._blank.get(key, 0) + 1
        self._blank[key] = uses
        return uses & (uses - 1) == 0

    def _guarded(self, key: Key, fast: Make) -> Tensor | None:
        """The kernel's result; None if it raised, and is barred now."""
        try:
            return fast()
        except (SidepathError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            self._bar(key, f"it raised {type(error).__name__}: {error}")
            return None

    def _try(self, key: Key, fast: Make, plain: Make, expected: Tensor | None, timed: bool) -> None:
        """`expected`: what `plain` gave, where that is known."""
        try:
            expected = plain() if expected is None else expected
            found = self._guarded(key, fast)
            if found is None:
                return
            agrees, why = compare(found, expected)
            slower = bool(agrees) and timed and self._timer(fast) > self._timer(plain)
        except torch.OutOfMemoryError:
            return  # there is room for one way, not for both: ask again another time
        if agrees is None:
            return
        if not agrees:
            self._bar(key, f"it disagreed with the plain path: {why}")
            return
        self.verdicts[key] = Verdict.SLOWER if slower else Verdict.FAST

    def _bar(self, key: Key, why: str) -> None:
        if key.kernel in self.barred:
            return
        self.barred[key.kernel] = why
        where = f"{', '.join(map(str, key.dtypes))}, shapes {key.shape}"
        text = f"the kernel {key.kernel} is not used in this process: {why} (at {where})"
        warnings.warn(text, KernelNotice, stacklevel=5)


TRIALS = Trials()
"""The one table of this process."""


def compare(found: Tensor, expected: Tensor) -> tuple[bool | None, str]:
    """Whether two results agree row by row within `TOLERANCES` (of `expected`'s dtype), and if not,
    why. None: `expected` is empty, all zero or not finite, and `found` is as well, so that nothing
    was seen.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False, f"{found.dtype} of shape {tuple(found.shape)}"
    if not expected.numel():
        return None, ""
    wanted = expected.reshape(-1, expected.shape[-1]).double()
    error = (found.reshape(wanted.shape).double() - wanted).abs().amax(1)
    scale = wanted.abs().amax(1)
    if not bool(torch.isfinite(scale).all()):
        return None, ""
    strongest, tiny = scale.max(), torch.finfo(expected.dtype).tiny
    allowed = TOLERANCES[expected.dtype] * torch.maximum(scale, FAINT * strongest) + tiny
    if bool((scale == 0).logical_and(error > tiny).any()):
        return False, "a row that adds nothing was changed"
    # Written so that an error that is not a number is too large.
    if not bool((error <= allowed).all()):
        row = int((error - allowed).nan_to_num(torch.inf).argmax())
        return (
            False,
            f"off by {float(error[row]):.2g} where numbers are up to {float(scale[row]):.2g}",
        )
    return (True, "") if float(strongest) else (None, "")


def _after(add: Add, y: Tensor) -> Tensor:
    add(y)
    return y


def _capturing() -> bool:
    """Whether a CUDA graph is being recorded, in which nothing can be compared."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
