"""What a piece of code does, counted: the Python functions it calls, a module's forward passes."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

from torch import nn


def calls_in(run: Callable[[], object]) -> list[str]:
    """Every Python function that is called, in order."""
    seen: list[str] = []

    def tracer(frame: Any, event: str, arg: object) -> None:
        if event == "call":
            seen.append(f"{frame.f_code.co_filename}:{frame.f_code.co_qualname}")

    gc.collect()
    gc.disable()  # a collection in between calls what others registered with it
    sys.setprofile(tracer)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return seen


def shadow_forward(module: nn.Module) -> tuple[Callable[..., Any], list[tuple[Any, ...]]]:
    """Shadow `forward` on the instance, as device maps do: the function there, and what it got."""
    original, calls = module.forward, []

    def hooked(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    module.forward = hooked  # type: ignore[method-assign]
    return hooked, calls
