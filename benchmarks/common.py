"""What the benchmark and result scripts share: the machine's name, tables, interleaved timing."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def machine() -> str:
    """Processor, cores and torch, in one line: absolute times mean nothing without it."""
    import torch

    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":")[1].strip() if names else processor
    threads = torch.get_num_threads()
    return f"{processor}, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}"


def need(*parts: str) -> Path:
    """A path of the shared material, or a clear end of the script."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        sys.exit(f"{Path(sys.argv[0]).name}: needs shared/{'/'.join(parts)} beside the checkout")
    return path


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def interleaved(
    actions: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each action, A B C A B C ...: what slows the machine slows all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(warmup + rounds):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratios(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Ratio of each pair of neighbouring runs: median, smallest, largest."""
    pairs = [a / b for a, b in zip(one, other, strict=True)]
    return {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs)}


def show(document: Mapping[str, Any], *tables: str) -> None:
    """Tables on standard error for people, the JSON document on standard output."""
    for table in tables:
        print(table, file=sys.stderr)
    print(json.dumps(document, indent=1))
