"""Memory that runs out in a step: that request is told to come back, the others go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sidepath.errors import Overloaded, ServeError
from sidepath.serve.engine import Engine
from sidepath.serve.memory import out_of_memory
from sidepath.serve.requests import Request
from sidepath.serve.scheduler import Limits
from tests.conftest import tiny_llama


def real() -> BaseException:
    """What torch raises on this machine where memory does not suffice."""
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    return error.value


ERRORS: list[Callable[[], BaseException]] = [
    real,
    MemoryError,
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
]


def test_which_errors_it_is() -> None:
    assert all(out_of_memory(make()) for make in ERRORS)
    for other in (RuntimeError("shapes"), ValueError("memory"), OSError(12, "no memory")):
        assert not out_of_memory(other)


@pytest.mark.parametrize("make", ERRORS)
def test_the_request_that_there_is_no_memory_for_ends_and_no_other(
    make: Callable[[], BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(tiny_llama(), limits=Limits(rows=4, context=64, step_tokens=64))
    alone = [engine.submit(Request((5, n), max_new_tokens=4)) for n in (7, 8)]
    while engine.step():
        pass
    expected = [handle.result().tokens for handle in alone]
    compute = engine._runner.logits

    def failing(parts: Any) -> Any:
        if any(len(part.tokens) > 9 for part in parts):
            raise make()
        return compute(parts)

    monkeypatch.setattr(engine._runner, "logits", failing)
    small = [engine.submit(Request((5, n), max_new_tokens=4)) for n in (7, 8)]
    large = engine.submit(Request(tuple(range(3, 33)), max_new_tokens=4))
    while engine.step():
        pass
    with pytest.raises(Overloaded, match="not enough memory") as error:
        large.result()
    assert error.value.after >= 1
    assert isinstance(error.value, ServeError)
    assert [handle.result().tokens for handle in small] == expected
    assert engine.load == (0, 0, 0)
