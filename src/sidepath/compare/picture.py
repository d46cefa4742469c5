"""The picture of a comparison: the metric over what it costs, and the frontier."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ONE_BUDGET = 1.1
"""Entrants whose trained parameters differ by less than this factor cost the same."""


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


def picture(document: Mapping[str, Any]) -> bytes:
    """`drawn`, as a PNG."""
    buffer = io.BytesIO()
    drawn(document).savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def drawn(document: Mapping[str, Any]) -> Figure:
    """The metric over trained parameters, or by entrant where all have one budget: each seed a
    small point, their mean with its interval, and what a search was to reach.

    The axis shows the seeds' range: an interval of a few seeds may be many times as long.
    """
    from matplotlib.figure import Figure

    rows = [row for row in document["rows"] if row["metric"]]
    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    axis = figure.subplots()
    costs = [row["trainable"] for row in rows]
    if len(rows) > 1 and max(costs) < ONE_BUDGET * min(costs):
        _by_entrant(axis, rows)
    else:
        _by_cost(axis, rows, higher=document["higher_is_better"])
    if "intrinsic" in document:
        axis.axhline(document["intrinsic"]["target"], color="#d55e00", linewidth=1, linestyle="--")
    values = [value for row in rows for value in row["metric"]["values"]]
    room = 0.15 * (max(values) - min(values)) or 0.05 * abs(max(values)) or 1.0
    axis.set_ylim(min(values) - room, max(values) + room)
    axis.set_ylabel(f"{document['metric']}: seeds, their mean and its 95 % interval", fontsize=9)
    axis.grid(alpha=0.25)
    return figure


def _by_entrant(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Side by side: over its cost, everyone would stand in one place."""
    for at, row in enumerate(rows):
        _draw(axis, at, row["metric"])
    names = [row["method"] for row in rows]
    axis.set_xticks(range(len(rows)), names, rotation=20, ha="right", fontsize=8)
    axis.set_xlabel(f"each with about {rows[0]['trainable']:,} trained parameters", fontsize=9)


def _by_cost(axis: Any, rows: Sequence[Mapping[str, Any]], *, higher: bool) -> None:
    """Over the trained parameters, with names and the frontier."""
    points = {row["method"]: (row["trainable"], row["metric"]["mean"]) for row in rows}
    least, most = (choose(x for x, _ in points.values()) for choose in (min, max))
    for row in rows:
        x, metric = row["trainable"], row["metric"]
        _draw(axis, x, metric)
        right = x * x > least * most  # in the right half of the logarithmic axis
        options = {"textcoords": "offset points", "fontsize": 8, "ha": "right" if right else "left"}
        axis.annotate(row["method"], (x, metric["mean"]), xytext=(-6 if right else 6, 4), **options)
    on = [
        points[name]
        for name in frontier([(name, *point) for name, point in points.items()], higher=higher)
    ]
    steps = [*on, (most, on[-1][1])]
    axis.step(*zip(*steps, strict=True), where="post", color="#0b6e4f", linewidth=1)
    axis.set_xscale("log")
    axis.set_xlabel("trained parameters", fontsize=9)


def _draw(axis: Any, x: float, metric: Mapping[str, Any]) -> None:
    """One entrant."""
    values = metric["values"]
    if metric["low"] is not None:
        axis.plot([x, x], [metric["low"], metric["high"]], color="#8a8a94", linewidth=1, zorder=1)
    axis.plot(x, metric["mean"], "o", color="#0072b2", markersize=6)
    axis.plot([x] * len(values), values, "o", color="#e69f00", markersize=3)
