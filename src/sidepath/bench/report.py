"""The figures for people: a table, ratios first, and a picture; and the folder of all three."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sidepath.bench.figure import OURS, PEER, Comparison, Figure, Unit
from sidepath.bench.picture import picture
from sidepath.bench.timing import Spread
from sidepath.page import has_matplotlib
from sidepath.store.plan import readable

HEAD = ("figure", "of", "median (min to max)", "to reach", "reached", "ours", "PEFT")


def table_rows(figures: Sequence[Figure]) -> list[list[str]]:
    """A row for each comparison, ratios first; what is measured stands in a figure's first row."""
    rows = []
    for figure in figures:
        lines = sorted(figure.comparisons, key=lambda one: (one.target is None, not one.is_ratio))
        ways = [figure.ways.get(way) for way in (OURS, PEER)]
        values = ["-" if way is None else shown(way.median, figure.unit) for way in ways]
        for number, one in enumerate(lines):
            first = number == 0
            rows.append([figure.name if first else "", *_cells(one, figure.unit)])
            rows[-1] += values if first else ["", ""]
        if not lines:
            rows.append([figure.name, *["-"] * 4, *values])
    return rows


def _cells(one: Comparison, unit: Unit) -> list[str]:
    verdict = {None: "-", True: "yes", False: "no"}[one.reached]
    if one.is_ratio:
        target = "-" if one.target is None else str(one.target)
        return [one.of, spread_text(one.spread, lambda value: f"{value:.2f}"), target, verdict]
    target = "-"
    if one.target is not None:
        sign = ">=" if one.target.at_least else "<="
        target = f"{sign} {shown(one.target.limit, unit)}"
    return [one.of, spread_text(one.spread, lambda value: shown(value, unit)), target, verdict]


def spread_text(spread: Spread, text: Callable[[float], str]) -> str:
    """A median with its range, where it has one."""
    middle = text(spread.median)
    if spread.min == spread.max:
        return middle
    return f"{middle} ({text(spread.min)} to {text(spread.max)})"


def shown(value: float, unit: Unit) -> str:
    """A value of a way as people read it."""
    if unit == "bytes":
        return readable(round(value))
    if unit == "calls":
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f} s"
    return f"{value * 1000:,.0f} ms" if value >= 0.1 else f"{value * 1000:.3g} ms"


def notes(figures: Sequence[Figure], document: Mapping[str, Any]) -> list[str]:
    """What is measured under each name, with what is to be known of it; then of all of them."""
    lines = []
    for figure in figures:
        bound = [] if figure.bound is None else [f"memory's bound {figure.bound:.2f}"]
        gpu = [f"{way} {readable(size)} at most" for way, size in figure.peak_bytes.items()]
        lines.append(f"{figure.name}: {'; '.join([figure.what, *bound, *figure.notes, *gpu])}")
    rounds = f"{document['rounds']} rounds after a warm-up, ways interleaved in one process"
    return [*lines, f"{document['machine']}; {rounds}", *document["notes"]]


def markdown(figures: Sequence[Figure], document: Mapping[str, Any]) -> str:
    """The table and its notes as a Markdown page."""
    lines = [HEAD, ["---"] * len(HEAD), *table_rows(figures)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    said = "\n".join(f"- {line}" for line in notes(figures, document))
    return f"# Benchmarks\n\n{table}\n\n{said}\n"


def write(folder: Path, figures: Sequence[Figure], document: Mapping[str, Any]) -> list[str]:
    """Write `bench.json`, `bench.md` and, where matplotlib is installed, `bench.png` and `.svg`.

    Files of these names are replaced one by one. Returns the names of what was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1, allow_nan=False)
    _replace(folder / "bench.json", f"{text}\n".encode())
    _replace(folder / "bench.md", markdown(figures, document).encode())
    written = ["bench.json", "bench.md"]
    if has_matplotlib():
        for ending in ("png", "svg"):
            _replace(folder / f"bench.{ending}", picture(figures, str(document["machine"]), ending))
            written.append(f"bench.{ending}")
    return written


def _replace(path: Path, content: bytes) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    part.replace(path)
