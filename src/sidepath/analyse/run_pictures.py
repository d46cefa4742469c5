"""How an adapter was trained, drawn: its losses, and each kind of matrix over the steps (SVG)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sidepath.analyse.advise import kind_of
from sidepath.page import COLOURS, LINES, canvas, running_mean, svg

History = Mapping[str, Any]
Lines = Mapping[str, Sequence[Sequence[float]]]
"""The series of each kind of matrix, one a block, over the watched steps; NaN where unknown."""
MOST_POINTS = 1000
"""Steps that one curve is drawn through; of more, every so many."""


def lines_of(history: History, figure: str) -> dict[str, list[list[float]]]:
    """A figure of the places that have it, by what the matrix is called in its block."""
    found: dict[str, list[list[float]]] = {}
    for layer in history["layers"]:
        if layer[figure] is not None:
            series = [math.nan if value is None else value for value in layer[figure]]
            found.setdefault(kind_of(layer["name"]), []).append(series)
    return found


def median(values: Sequence[float]) -> float:
    """The middle one of those that are known."""
    known = sorted(value for value in values if not math.isnan(value))
    return known[len(known) // 2] if known else math.nan


def window_of(history: History) -> int:
    """Steps that the drawn mean of the losses runs over: a fiftieth of the run."""
    return max(1, len(history["loss"]) // 50)


def losses(history: History) -> str:
    """The loss of each step, its running mean, and the held-out loss where it was measured."""
    loss, window = history["loss"], window_of(history)
    every = max(1, len(loss) // MOST_POINTS)
    steps = range(1, len(loss) + 1, every)
    drawn = canvas(10, 3.4)
    axis = drawn.subplots()
    if window > 1:
        axis.plot(steps, loss[::every], color=COLOURS[0], alpha=0.3, linewidth=0.8)
    mean = running_mean(loss, window)[::every]
    label = "training" if window == 1 else f"training, mean of {window} steps"
    marker = "." if len(loss) < 60 else ""
    axis.plot(steps, mean, color=COLOURS[0], marker=marker, linewidth=1.8, label=label)
    if history["held_out"]:
        places, values = zip(*history["held_out"], strict=True)
        axis.plot(places, values, "--", marker="o", color=COLOURS[1], label="held-out rows")
    axis.set_xlabel("step")
    axis.set_ylabel("loss (nats)")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    return svg(drawn, "losses")


def over_steps(history: History, figure: str, label: str) -> str:
    """A figure over the watched steps: the median over blocks, and the range, for each kind."""
    drawn = canvas(10, 3.4)
    axis = drawn.subplots()
    steps = history["steps"]
    every = max(1, len(steps) // MOST_POINTS)
    marker = "." if len(steps) < 60 else ""
    for number, (kind, own) in enumerate(lines_of(history, figure).items()):
        columns = [
            [value for value in column if not math.isnan(value)] or [math.nan]
            for column in list(zip(*own, strict=True))[::every]
        ]
        colour, line = COLOURS[number % len(COLOURS)], LINES[number // len(COLOURS) % len(LINES)]
        middle = [median(column) for column in columns]
        axis.plot(
            steps[::every], middle, line, marker=marker, color=colour, label=kind, linewidth=1.6
        )
        axis.fill_between(
            steps[::every],
            [min(column) for column in columns],
            [max(column) for column in columns],
            color=colour,
            alpha=0.10,
            linewidth=0,
        )
    axis.set_xlabel("step")
    axis.set_ylabel(label)
    axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return svg(drawn, figure)
