"""The picture of the figures: a line for each, ours and PEFT's on it, and the target."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from sidepath.bench.figure import OURS, PEER, Figure
from sidepath.bench.timing import Spread

STYLES = {OURS: ("#0072b2", "o"), PEER: ("#d55e00", "s")}
OTHERS = "#8a8a94"
TARGET, REACH = "#0b6e4f", "to reach"
LINEAR_BELOW = 4.0
"""Values nearer together than this factor stand on a linear axis."""
LINE_INCHES, FRAME_INCHES, WIDTH_INCHES = 0.34, 1.25, 9.0
Points = dict[str, Spread]


def panels(figures: Sequence[Figure]) -> dict[str, list[tuple[str, Points, float | None]]]:
    """By the axis they stand on: each figure's name, the points on its line, and its target.

    A figure of times with a reference stands on the axis of ratios to it; all others on their
    unit's. A target that is a ratio to another way becomes a value by that way's median.
    """
    order = [OVER_REFERENCE, *(label for label, _ in AXES.values())]
    found: dict[str, list[tuple[str, Points, float | None]]] = {label: [] for label in order}
    for figure in figures:
        if figure.unit == "seconds" and figure.reference is not None:
            axis, points = OVER_REFERENCE, over_reference(figure)
        else:
            axis, scale = AXES[figure.unit]
            points = {way: _scaled(spread, scale) for way, spread in figure.ways.items()}
        found[axis].append((figure.name, points, target_of(figure, points)))
    return {label: lines for label, lines in found.items() if lines}


OVER_REFERENCE = "times the reference: floor, base or copy"
AXES = {"bytes": ("MiB", 2.0**-20), "seconds": ("ms", 1e3), "calls": ("calls", 1)}


def over_reference(figure: Figure) -> Points:
    """Each way's value over the reference's: of neighbouring runs where they were compared."""
    reference = figure.reference
    assert reference is not None
    compared = {one.of: one.spread for one in figure.comparisons}
    below = figure.ways[reference].median
    return {
        way: compared.get(f"{way} / {reference}", _alone(spread.median / below))
        for way, spread in figure.ways.items()
        if way != reference
    }


def target_of(figure: Figure, points: Mapping[str, Spread]) -> float | None:
    """Where ours should come to on the figure's line; None without such a target."""
    for one in figure.comparisons:
        top, _, bottom = one.of.partition(" / ")
        if one.target is None or top != OURS:
            continue
        if not bottom:
            return one.target.limit * points[OURS].median / figure.ways[OURS].median
        if bottom == figure.reference and bottom not in points:
            return one.target.limit
        if bottom in points:
            return one.target.limit * points[bottom].median
    return None


def picture(figures: Sequence[Figure], caption: str, ending: str) -> bytes:
    """The picture as a PNG's or an SVG's bytes; the same bytes for the same figures."""
    import matplotlib

    matplotlib.use("agg" if ending == "png" else "svg")
    from matplotlib.figure import Figure as Drawn

    found = panels(figures)
    sizes = [len(lines) * LINE_INCHES + FRAME_INCHES for lines in found.values()]
    drawn = Drawn(figsize=(WIDTH_INCHES, sum(sizes) + 0.6), layout="constrained")
    axes = drawn.subplots(len(found), 1, squeeze=False, height_ratios=sizes)[:, 0]
    for axis, (label, lines) in zip(axes, found.items(), strict=True):
        _panel(axis, label, lines)
    drawn.suptitle(caption, fontsize=9, color="#444")
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "sidepath"}):
        facts: dict[str, Any] = {"Date": None} if ending == "svg" else {"Software": None}
        drawn.savefig(buffer, format=ending, dpi=130, metadata=facts)
    return buffer.getvalue()


def _panel(axis: Any, label: str, lines: Sequence[tuple[str, Points, float | None]]) -> None:
    for height, (_, points, target) in enumerate(reversed(lines)):
        # Ours is drawn last, above all others.
        for way, spread in sorted(points.items(), key=lambda one: one[0] == OURS):
            _point(axis, way, spread, height)
        if target is not None:
            axis.plot(target, height, "|", color=TARGET, ms=15, mew=2.2, label=REACH)
    _frame(axis, label, [name for name, _, _ in reversed(lines)])


def _point(axis: Any, way: str, spread: Spread, height: int) -> None:
    """A way's median with its range; one that has no colour of its own is named beside it."""
    colour, mark = STYLES.get(way, (OTHERS, "d"))
    axis.plot([spread.min, spread.max], [height] * 2, color=colour, linewidth=2, alpha=0.5)
    axis.plot(spread.median, height, mark, color=colour, markersize=6, label=way)
    if way not in STYLES:
        place = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center"}
        axis.annotate(way, (spread.median, height), fontsize=6.5, color=OTHERS, **place)


def _frame(axis: Any, label: str, names: Sequence[str]) -> None:
    axis.set_yticks(range(len(names)), names, fontsize=8.5)
    axis.set_ylim(-0.6, len(names) - 0.3)
    axis.set_xlabel(label, fontsize=9)
    if label == OVER_REFERENCE:
        axis.axvline(1, color="#1b1b1f", linewidth=0.8)
    _scale(axis)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.tick_params(axis="x", labelsize=7.5)
    axis.grid(alpha=0.25)
    known = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    shown = [label for label in (OURS, PEER, REACH) if label in known]
    axis.legend(
        [known[label] for label in shown],
        shown,
        frameon=False,
        fontsize=8,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=3,
    )


def _scale(axis: Any) -> None:
    """Logarithmic where the values are far apart, with few enough numbers to be read."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axis.dataLim.intervalx
    widest = high / max(low, 1e-9)
    if widest < LINEAR_BELOW:
        return
    axis.set_xscale("log")
    subs = (1.0,) if widest > 1e3 else (1.0, 2.0, 5.0)
    axis.xaxis.set_major_locator(LogLocator(subs=subs))
    axis.xaxis.set_minor_locator(NullLocator())


def _scaled(spread: Spread, by: float) -> Spread:
    return Spread(spread.median * by, spread.min * by, spread.max * by)


def _alone(value: float) -> Spread:
    return Spread(value, value, value)
