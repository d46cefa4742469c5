"""A comparison for people: tables, notes, Markdown, and the picture of the frontier."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Document = Mapping[str, Any]
JSON, MARKDOWN, PICTURE = "compare.json", "compare.md", "pareto.png"
HEAD = (
    "method",
    "trained",
    "bytes",
    "rate",
    "metric",
    "95 % interval",
    "beside the first",
    "seconds",
    "peak MiB",
    "latency",
)
SWEEP_HEAD = ("method", "rate", "validation", "loss", "")
LATENCY_HEAD = ("method", "form", "batch", "base ms", "ms", "ratio", "of", "operators", "base's")
SEARCH_HEAD = ("d", "score", "95 % interval", "")
PICTURE_MISSING = "no picture: pip install 'sidepath[report]'"


def table_rows(document: Document) -> list[list[object]]:
    """The rows below `HEAD`."""
    found: list[list[object]] = []
    for row in document["rows"]:
        metric, beside, latency = row["metric"], row["beside_first"], row["latency"]
        told = None if beside is None else f"{beside['mean']:+.4g}: {beside['verdict']}"
        peak = row["peak_memory_bytes"]
        found.append(
            [
                row["method"],
                row["trainable"],
                row["bytes"],
                None if row["learning_rate"] is None else f"{row['learning_rate']:g}",
                None if metric is None else float(metric["mean"]),
                None if metric is None else _spread(metric),
                told,
                row["seconds"],
                None if peak is None else round(peak / 2**20, 1),
                f"x {latency[0]['ratio']['median']:.3f} {latency[0]['form']}" if latency else None,
            ]
        )
    return found


def sweep_rows(document: Document) -> list[list[object]]:
    """Every learning rate tried, below `SWEEP_HEAD`."""
    return [
        [
            row["method"],
            f"{one['learning_rate']:g}",
            one["value"],
            one["loss"],
            "failed"
            if one["failed"]
            else "taken"
            if one["learning_rate"] == row["learning_rate"]
            else "",
        ]
        for row in document["rows"]
        for one in row["sweep"]
    ]


def latency_rows(document: Document) -> list[list[object]]:
    """Every latency, below `LATENCY_HEAD`."""
    return [
        [
            row["method"],
            one["form"],
            one["shape"],
            1e3 * one["base_seconds"]["median"],
            1e3 * one["seconds"]["median"],
            f"{one['ratio']['median']:.3f}",
            f"{one['ratio']['min']:.3f} to {one['ratio']['max']:.3f}",
            one["operators"],
            one["base_operators"],
        ]
        for row in document["rows"]
        for one in row["latency"]
    ]


def _spread(found: Mapping[str, Any]) -> str | None:
    return None if found["low"] is None else f"{found['low']:.4g} to {found['high']:.4g}"


def search_rows(document: Document) -> list[list[object]]:
    """Every dimension that a search tried, below `SEARCH_HEAD`."""
    tried = document["intrinsic"]["trials"] if "intrinsic" in document else []
    return [
        [one["d"], one["score"], _spread(one), "reached" if one["reached"] else "short of it"]
        for one in tried
    ]


def sections(document: Document) -> list[tuple[str, Sequence[str], list[list[object]]]]:
    """The tables behind the first one that there is something to say in: title, head, rows."""
    found = (
        (_search_title(document), SEARCH_HEAD, search_rows(document)),
        ("learning rates tried, on validation rows", SWEEP_HEAD, sweep_rows(document)),
        ("latency beside the base", LATENCY_HEAD, latency_rows(document)),
    )
    return [(title, head, rows) for title, head, rows in found if rows]


def _search_title(document: Document) -> str:
    found = document.get("intrinsic")
    if found is None:
        return ""
    return f"dimensions tried ({found['kind']}), to reach {found['target']:.4g}"


def verdict_of_search(document: Document) -> list[str]:
    """What a search came to, in one sentence; nothing where there was none."""
    found = document.get("intrinsic")
    if found is None:
        return []
    name = f"d{100 * found['share']:.4g}"
    goal = f"{found['share']:g} x {found['full']:.4g} of full fine-tuning = {found['target']:.4g}"
    if found["d"] is None:
        most = found["dimensions"][-1]
        return [
            f"{name} is above {most:,}, the largest dimension tried: {goal} was not reached; "
            "search higher with --dimensions"
        ]
    least = found["d"] == found["dimensions"][0]
    rest = "the smallest tried: search lower with --dimensions" if least else "an upper bound"
    return [f"{name} = {found['d']:,} trained numbers reach {goal} ({rest})"]


def notes(document: Document) -> list[str]:
    """What has to be known to read the table."""
    told = verdict_of_search(document)
    told += [
        f"{one['method']} took no part: {' '.join(str(one['reason']).split())}"
        for one in document["excluded"]
    ]
    edge = [row["method"] for row in document["rows"] if row["at_edge"]]
    if edge:
        told.append(
            f"best rate at the sweep's edge (a better one may lie beyond): {', '.join(edge)}"
        )
    told += [
        f"{row['method']}: seed {one['seed']} failed: {' '.join(str(one['reason']).split())}"
        for row in document["rows"]
        for one in row["failed"]
    ]
    if any(row["metric"] and len(row["metric"]["values"]) == 2 for row in document["rows"]):
        told.append(
            "an interval of two seeds reaches 9 standard deviations to each side and says little: "
            "give 3 seeds or more"
        )
    pairs = [row["beside_first"]["pairs"] for row in document["rows"] if row["beside_first"]]
    if pairs:
        told.append(
            f"differences: paired over {max(pairs)} seeds, t-test adjusted for their number, "
            f"{len(pairs)} (Holm); the sign-flip test cannot fall below "
            f"{2.0 ** (1 - max(pairs)):.2g} here. They tell luck of training apart, not luck of "
            "the test rows"
        )
    return told


def markdown(document: Document) -> str:
    """The tables and notes as Markdown."""
    data = document["data"]
    parts = [
        "# Comparison",
        f"{data['name']}: {data['train']:,} training rows ({data['validation']:,} of them for "
        f"learning rates), {data['test']:,} test rows; metric {document['metric']}; base "
        f"{document['base']}",
        _grid(HEAD, table_rows(document)),
        "\n".join(f"- {note}" for note in notes(document)),
    ]
    for title, head, rows in sections(document):
        parts += [f"## {title[0].upper()}{title[1:]}", _grid(head, rows)]
    return "\n\n".join(parts) + "\n"


def _grid(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *[[_cell(one) for one in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def write(folder: Path, document: Document) -> list[str]:
    """Write document, Markdown and (with matplotlib) the picture; the names of what was written."""
    files = {
        JSON: (json.dumps(document, indent=2) + "\n").encode(),
        MARKDOWN: markdown(document).encode(),
    }
    if has_matplotlib() and any(row["metric"] for row in document["rows"]):
        files[PICTURE] = picture(document)
    for name, content in files.items():
        path = folder / name
        part = path.with_name(path.name + ".part")
        part.write_bytes(content)
        part.replace(path)
    return list(files)


def has_matplotlib() -> bool:
    """Whether the picture can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def frontier(points: Sequence[tuple[str, float, float]], *, higher: bool) -> list[str]:
    """Of (name, cost, value), the names that no other beats in both: cheaper and at least as good,
    or as cheap and better; in order of cost.
    """
    sign = 1.0 if higher else -1.0
    best = float("-inf")
    kept = []
    for name, _, value in sorted(points, key=lambda one: (one[1], -sign * one[2])):
        if sign * value > best:
            best = sign * value
            kept.append(name)
    return kept


def picture(document: Document) -> bytes:
    """`drawn`, as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    buffer = io.BytesIO()
    drawn(document).savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def drawn(document: Document) -> Figure:
    """The metric over trained parameters: each seed a small point, their means with the
    intervals, the frontier, and what a search was to reach.

    The axis shows the seeds' range: an interval of a few seeds may be many times as long.
    """
    from matplotlib.figure import Figure

    rows = [row for row in document["rows"] if row["metric"]]
    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    axis = figure.subplots()
    points = {row["method"]: (row["trainable"], row["metric"]["mean"]) for row in rows}
    for row in rows:
        _draw(axis, row)
    on = frontier(
        [(name, *point) for name, point in points.items()], higher=document["higher_is_better"]
    )
    steps = [
        *(points[name] for name in on),
        (max(x for x, _ in points.values()), points[on[-1]][1]),
    ]
    axis.step(*zip(*steps, strict=True), where="post", color="#0b6e4f", linewidth=1)
    if "intrinsic" in document:
        axis.axhline(document["intrinsic"]["target"], color="#d55e00", linewidth=1, linestyle="--")
    values = [value for row in rows for value in row["metric"]["values"]]
    room = 0.15 * (max(values) - min(values)) or 0.05 * abs(max(values)) or 1.0
    axis.set_ylim(min(values) - room, max(values) + room)
    axis.set_xscale("log")
    axis.set_xlabel("trained parameters", fontsize=9)
    axis.set_ylabel(f"{document['metric']}: seeds, their mean and its 95 % interval", fontsize=9)
    axis.grid(alpha=0.25)
    return figure


def _draw(axis: Any, row: Mapping[str, Any]) -> None:
    """One entrant."""
    metric, x = row["metric"], row["trainable"]
    values = metric["values"]
    axis.plot([x] * len(values), values, "o", color="#56b4e9", markersize=3, alpha=0.8)
    if metric["low"] is not None:
        axis.plot([x, x], [metric["low"], metric["high"]], color="#8a8a94", linewidth=1, zorder=1)
    axis.plot(x, metric["mean"], "o", color="#0072b2", markersize=6)
    axis.annotate(
        row["method"],
        (x, metric["mean"]),
        xytext=(6, 4),
        textcoords="offset points",
        fontsize=8,
        clip_on=False,
    )
