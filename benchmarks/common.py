"""What the benchmark and result scripts share; the timing is that of `sidepath bench`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sidepath.bench.setting import machine
from sidepath.bench.timing import interleaved, ratios

__all__ = [
    "ROOT",
    "SHARED",
    "family",
    "interleaved",
    "machine",
    "markdown",
    "need",
    "ratios",
    "show",
]

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


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


def show(document: Mapping[str, Any], *tables: str) -> None:
    """Tables on standard error for people, the JSON document on standard output."""
    for table in tables:
        print(table, file=sys.stderr)
    print(json.dumps(document, indent=1))


def family(name: str) -> None:
    """Measure a family of figures, with the flags of `sidepath bench`, and end the script."""
    from sidepath.cli import main

    sys.exit(main(["bench", name, *sys.argv[1:]]))
