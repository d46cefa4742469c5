"""What an adapter learned, drawn: spectra, energies, shared subspaces (SVG, by matplotlib)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sidepath.analyse.advise import kind_of
from sidepath.page import COLOURS, LINES, canvas, svg

Layer = Mapping[str, Any]
SHOWN = 6
"""Layers whose similarity grids are on one page."""
GRIDS = {"A": "A", "inputs": "ΔW, inputs", "outputs": "ΔW, outputs", "random": "random A"}
"""The grids of a layer that are drawn, and their titles."""


def by_kind(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Layers by what the matrix is called in its block, in the model's own order."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        found.setdefault(kind_of(layer["name"]), []).append(layer)
    return found


def block_number(path: str) -> int | None:
    """The number of the block a module lies in: the first number in its path."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
    return int(numbers[0]) if numbers else None


def spectra(layers: Sequence[Layer]) -> str:
    """Singular values over their number: the median over blocks, and the range, for each kind."""
    kinds = by_kind(layers)
    drawn = canvas(10, 3.6)
    axis = drawn.subplots()
    for number, (kind, own) in enumerate(kinds.items()):
        columns = list(zip(*(one["singular_values"] for one in own), strict=False))
        places = range(1, len(columns) + 1)
        middle = [sorted(column)[len(column) // 2] for column in columns]
        colour, line = COLOURS[number % len(COLOURS)], LINES[number // len(COLOURS) % len(LINES)]
        axis.plot(places, middle, line, marker=".", color=colour, label=kind, linewidth=1.6)
        axis.fill_between(
            places,
            [min(column) for column in columns],
            [max(column) for column in columns],
            color=colour,
            alpha=0.10,
            linewidth=0,
        )
    if any(value > 0 for one in layers for value in one["singular_values"]):
        axis.set_yscale("log")
    axis.set_xlabel("number of the direction, the largest first")
    axis.set_ylabel("singular value of ΔW")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8, ncols=2)
    return svg(drawn, "spectra")


def energies(layers: Sequence[Layer]) -> str:
    """‖ΔW‖ of each block and kind as a map; white: no update there."""
    kinds = list(by_kind(layers))
    blocks = sorted({block for one in layers if (block := block_number(one["name"])) is not None})
    rows: list[int | None] = [*blocks]
    if any(block_number(one["name"]) is None for one in layers):
        rows.append(None)
    norms = [[math.nan] * len(kinds) for _ in rows]
    for one in layers:
        norms[rows.index(block_number(one["name"]))][kinds.index(kind_of(one["name"]))] = one[
            "norm"
        ]
    drawn = canvas(10, min(9.0, 1.6 + 0.32 * len(rows)))
    axis = drawn.subplots()
    shown = axis.imshow(norms, cmap="cividis", aspect="auto", vmin=0)
    axis.set_xticks(range(len(kinds)), kinds, fontsize=8)
    every = max(1, len(rows) // 24)
    places = range(0, len(rows), every)
    axis.set_yticks(places, ["-" if rows[at] is None else str(rows[at]) for at in places])
    axis.set_xlabel("matrix")
    axis.set_ylabel("block")
    drawn.colorbar(shown, ax=axis, label="norm of ΔW")
    return svg(drawn, "energies")


def similarities(pairs: Sequence[Mapping[str, Any]]) -> str:
    """φ(i, j) as grids on the scale 0 to 1: a line a layer, the control last."""
    shown = pairs[:SHOWN]
    drawn = canvas(10, 0.6 + 2.6 * len(shown))
    axes = drawn.subplots(len(shown), len(GRIDS), squeeze=False)
    for line, pair in zip(axes, shown, strict=True):
        for axis, (name, title) in zip(line, GRIDS.items(), strict=True):
            phi = pair["phi"] if name == "A" else pair["grids"][name]
            if not phi:  # an update that changes nothing
                axis.set_axis_off()
                continue
            extent = (0.5, len(phi[0]) + 0.5, len(phi) + 0.5, 0.5)
            image = axis.imshow(phi, cmap="cividis", vmin=0, vmax=1, aspect="auto", extent=extent)
            axis.set_title(title, fontsize=8)
            axis.set_xlabel("j, of the second", fontsize=8)
            for ticks in (axis.xaxis, axis.yaxis):
                ticks.get_major_locator().set_params(integer=True)
        line[0].set_ylabel(f"{_short(pair['name'])}\ni, of the first", fontsize=8)
    drawn.colorbar(image, ax=axes, label="φ(i, j)", location="top", shrink=0.5, aspect=40, pad=0.01)
    return svg(drawn, "similarities")


def _short(path: str) -> str:
    """The end of a path, from its block's number on."""
    found = re.search(r"(?:^|\.)(\d+\..*)$", path)
    return found[1] if found else path
