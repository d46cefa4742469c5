"""What a figure is measured with, and the machine it is measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from sidepath.bench.figure import Figure
from sidepath.bench.timing import Action, Clock, interleaved

NOT_A_MEASUREMENT = "quick: tiny shapes that only show that the code runs; not a measurement"
QUICK_ROUNDS, QUICK_ROWS, QUICK_TOKENS = 2, 3, 8


@dataclass(frozen=True)
class Bench:
    """How to measure; every figure is a function of its name and this."""

    rounds: int = 7
    """Runs of each way that count."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    quick: bool = False
    """Tiny shapes and two rounds, for tests: see `NOT_A_MEASUREMENT`."""

    @property
    def counted_rounds(self) -> int:
        """Runs of each way that count, at this size."""
        return QUICK_ROUNDS if self.quick else self.rounds

    def rows(self, count: int) -> int:
        """Rows of a batch that should have `count`."""
        return min(count, QUICK_ROWS) if self.quick else count

    def tokens(self, count: int) -> int:
        """Tokens of a row that should have `count`."""
        return min(count, QUICK_TOKENS) if self.quick else count

    def timed(
        self,
        actions: Mapping[str, Action],
        *,
        warmup: int = 2,
        before: Mapping[str, Action] | None = None,
        after: Mapping[str, Action] | None = None,
    ) -> tuple[dict[str, list[float]], dict[str, int]]:
        """`interleaved` on this device: seconds of each way, and its peak bytes on a GPU."""
        clock = Clock(self.device)
        rounds, warmup = self.counted_rounds, 1 if self.quick else warmup
        seconds = interleaved(
            actions,
            rounds=rounds,
            warmup=warmup,
            before=before,
            after=after,
            clock=clock,
        )
        return seconds, clock.peak_bytes


Measure = Callable[[str, Bench], Figure]
"""Measures one figure, which is to bear the name given."""


def machine(device: torch.device | None = None) -> str:
    """Processor, cores and torch, in one line: absolute times mean nothing without it."""
    parts = [_processor(), f"{os.cpu_count()} cores", f"{torch.get_num_threads()} threads"]
    if device is not None and device.type == "cuda":
        parts.append(f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}")
    return ", ".join([*parts, f"torch {torch.__version__}"])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions(packages: Sequence[str] = ("torch", "transformers", "peft")) -> dict[str, str | None]:
    """Versions of what takes part; None for what is not installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found
