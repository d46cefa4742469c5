"""Nothing here runs without a GPU: `make test-gpu` where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Run, pairs, run, tiny_base

__all__ = ["Run", "pairs", "run", "tiny_base"]


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")


@pytest.fixture
def gpu() -> torch.device:
    """The GPU, its memory given back by earlier tests."""
    torch.cuda.empty_cache()
    return torch.device("cuda")


@pytest.fixture
def base_flags(tiny_base: Path, pairs: Path) -> list[str]:
    """What every training command here begins with."""
    flags = f"train --base {tiny_base} --data {pairs} --steps 6 --r 2 --json --no-forgetting"
    return [*flags.split(), "--learning-rate", "0.02"]
