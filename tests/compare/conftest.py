"""What was imported is no garbage: trials collect theirs often, and need not look through it."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def looked_through_once() -> Iterator[None]:
    """Most of a trial's time here would else be `gc.collect` over the modules of a test run."""
    gc.freeze()
    yield
    gc.unfreeze()
