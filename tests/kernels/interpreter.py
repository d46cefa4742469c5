"""Where the bodies of tests of Triton kernels run: here on a GPU; else in Triton's interpreter.

The interpreter has to be asked for before Triton is imported, and here it may have been (by
bitsandbytes, for one). So the bodies run in one process of their own, started with the environment
it needs and kept until the end; `on_triton` sends the test's name and arguments there.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

MISSING = "triton is not installed: pip install 'sidepath[triton]'"
SETTINGS = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


def device() -> torch.device:
    """Where the tensors of a body lie."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_triton(body: Callable[..., None]) -> Callable[..., None]:
    """A test whose body runs where Triton's kernels do. Its arguments are pickled: plain values."""

    @functools.wraps(body)
    def run(*args: Any, **named: Any) -> None:
        if importlib.util.find_spec("triton") is None:
            pytest.skip(MISSING)
        if torch.cuda.is_available():
            body(*args, **named)
        else:
            _process().submit(_call, body.__module__, body.__name__, args, named).result()

    return run


@functools.cache
def _process() -> ProcessPoolExecutor:
    kept = {name: os.environ.get(name) for name in SETTINGS}
    os.environ.update(SETTINGS)
    try:
        process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        process.submit(int).result()  # started now, while the settings are there
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return process


def _call(module: str, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    test: Any = getattr(importlib.import_module(module), name)
    while not hasattr(test, "__wrapped__"):  # under hypothesis' decorator
        test = test.hypothesis.inner_test
    test.__wrapped__(*args, **named)
