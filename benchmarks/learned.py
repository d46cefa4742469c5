"""Section 7 of the LoRA paper on a base and data of your own: do ranks and seeds agree on what to
change, what of the base is amplified, and which rank would have been enough?

Trains LoRA of rank 8 and 64 on all linear layers with one seed, and of rank 64 with another, then
looks at the three with `sidepath inspect`; a training whose folder is there is not repeated.

    python benchmarks/learned.py --data TRAIN --output FOLDER [--base BASE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import markdown, show

ADAPTERS = {"r8": (8, 0), "r64": (64, 0), "r64-other-seed": (64, 1)}
"""Rank and seed of each adapter; alpha is twice the rank."""
PAIRS = {
    "r=8 and r=64, one seed": ("r8", "r64"),
    "r=64, two seeds": ("r64", "r64-other-seed"),
}
SHOWN = ((1, 1), (4, 4), (8, 8), (8, 64))
"""Places (i, j) of the grids that the table shows."""


def sidepath(*words: object) -> Any:
    """The JSON document of a command."""
    line = [sys.executable, "-m", "sidepath", *map(str, words), "--json"]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def trained(asked: argparse.Namespace, extra: Sequence[str]) -> dict[str, Path]:
    """The adapters' folders, trained where they are not there yet."""
    folders = {name: Path(asked.output, name) for name in ADAPTERS}
    for name, (rank, seed) in ADAPTERS.items():
        if not folders[name].exists():
            sidepath("train", *base_of(asked), "--data", asked.data, "--output", folders[name],
                     "--r", rank, "--alpha", 2 * rank, "--seed", seed, *extra)  # fmt: skip
    return folders


def base_of(asked: argparse.Namespace) -> list[str]:
    """The flag that names the base."""
    return [] if asked.base is None else ["--base", asked.base]


def grids(pair: Mapping[str, Any]) -> Iterator[tuple[str, list[list[float]]]]:
    """φ of one layer of two adapters, by what was compared."""
    yield "A", pair["phi"]
    for name in ("B", "inputs", "outputs", "random"):
        yield name, pair["grids"][name]


def shared(one: Path, other: Path) -> dict[str, dict[str, Any]]:
    """Median, smallest and largest φ over the layers, by what was compared and place (i, j)."""
    found: dict[str, dict[str, list[float]]] = {}
    for pair in sidepath("inspect", one, other)["similarity"]:
        for name, phi in grids(pair):
            for i, j in SHOWN:
                if i <= len(phi) and j <= len(phi[0]):
                    places = found.setdefault(name, {})
                    places.setdefault(f"{i}, {j}", []).append(phi[i - 1][j - 1])
    return {
        name: {place: spread(values) for place, values in places.items()}
        for name, places in found.items()
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def amplified(asked: argparse.Namespace, folders: Mapping[str, Path]) -> dict[str, Any]:
    """Table 7 of the adapters: medians over the layers."""
    names = ("update_norm", "weight_norm", "projected", "projected_on_own", "projected_on_random",
             "amplification", "in_top_inputs")  # fmt: skip
    found = {}
    for name in ("r8", "r64"):
        base = asked.base or embedded()
        rows = sidepath("inspect", folders[name], "--base", base)["against"]
        found[name] = {one: spread([row[one] for row in rows]) for one in names}
        found[name]["layers with intruders"] = sum(bool(row["intruders"]) for row in rows)
        found[name]["layers"] = len(rows)
    return found


def embedded() -> Path:
    """The embedded base's folder."""
    from sidepath import embedded_base

    return embedded_base()


def tables(document: Mapping[str, Any]) -> list[str]:
    """The document as Markdown."""
    places = [f"{i}, {j}" for i, j in SHOWN]
    rows = [
        [pair, name, *(told(values.get(place)) for place in places)]
        for pair, names in document["shared"].items()
        for name, values in names.items()
    ]
    first = markdown(["adapters", "directions of", *(f"φ({place})" for place in places)], rows)
    against = document["against"]
    second = markdown(
        ["measure", *against],
        [
            [one, *(told(values[one]) for values in against.values())]
            for one in next(iter(against.values()))
        ],
    )
    return [first, second]


def told(values: Any) -> str:
    """One cell."""
    if not isinstance(values, dict):
        return "-" if values is None else str(values)
    return f"{values['median']:.3g} ({values['min']:.2g} to {values['max']:.2g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog="Other flags go to `train`.")
    parser.add_argument("--base")
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    asked, extra = parser.parse_known_args()
    folders = trained(asked, extra)
    document = {
        "shared": {name: shared(folders[a], folders[b]) for name, (a, b) in PAIRS.items()},
        "against": amplified(asked, folders),
    }
    show(document, *tables(document))


if __name__ == "__main__":
    main()
