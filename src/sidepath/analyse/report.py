"""The report of `sidepath inspect --html`: its document, told and drawn for people."""

from __future__ import annotations

import html
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sidepath.analyse import pictures, run_report
from sidepath.page import drawn, page, table

Document = Mapping[str, Any]
Layer = Mapping[str, Any]
MOST_ROWS = 40
"""Rows of a table that are shown at once; the others unfold."""
TOLD = ("audit", "memory", "adapter_bytes")
"""Of the record, what has a section of its own."""


def report(document: Document, audit: Sequence[tuple[str, str]] = ()) -> str:
    """The page. Every number on it is one of the document's; `audit`: its audit, for people."""
    title = f"What {document['adapter']} learned"
    if document.get("other"):
        title = f"What {document['adapter']} and {document['other']} share"
    body = [f"<h1>{html.escape(title)}</h1>", _lead(document)]
    if document.get("layers"):
        body += _layers(document["layers"], document["energy"])
    if document.get("against"):
        body += _against(document["against"])
    if document.get("similarity"):
        body += _similarity(document)
    if document.get("truncated"):
        body += _truncated(document["truncated"])
    if document.get("advice"):
        body += _advice(document["advice"])
    if document.get("history"):
        body += run_report.trained(document["history"])
    if audit:
        body += run_report.audited(audit)
    if document.get("planned"):
        body += run_report.planned(document["planned"])
    if document.get("parity"):
        body += run_report.parity(document["parity"])
    body += _came_to_be(document.get("record") or {})
    return page(title, body)


def _lead(document: Document) -> str:
    facts = [f"{name} {value}" for name, value in document["facts"].items()]
    return f'<p class="lead">{html.escape("; ".join(facts))}.</p>'


def _layers(layers: Sequence[Layer], energy: Mapping[str, float]) -> list[str]:
    largest = next(iter(energy.items()))
    body = [
        "<h2>How many directions the updates use</h2>",
        f"<p>{html.escape(said_of_ranks(layers))}</p>",
        *drawn(
            lambda: pictures.spectra(layers),
            "Singular values of the updates, largest first, a line for each kind of matrix",
            "Singular values of ΔW: the median over blocks, and their range, for each kind of "
            "matrix. A line that falls early did not need its rank.",
        ),
        "<h2>Where the change is</h2>",
        f"<p>{html.escape(largest[0])} holds {100 * largest[1]:.0f} % of the energy, the sum of "
        "‖ΔW‖² over all layers.</p>",
        *drawn(
            lambda: pictures.energies(layers),
            "Norm of each update, blocks down, kinds of matrices across",
            "Frobenius norm of ΔW for each block and matrix; lighter is larger.",
        ),
        table(("matrix", "share of the energy"), [[k, f"{v:.1%}"] for k, v in energy.items()]),
    ]
    head = ("layer", "r", "σ1", "effective rank", "rank at 90 %", "at 99 %", "norm", "relative")
    rows = [
        [
            layer["name"],
            str(layer["r"]),
            _number(max(layer["singular_values"], default=0.0)),
            _number(layer["effective_rank"]),
            str(layer["rank_at_energy"]["0.9"]),
            str(layer["rank_at_energy"]["0.99"]),
            _number(layer["norm"]),
            _number(layer["relative_norm"]),
        ]
        for layer in layers
    ]
    return [*body, _folded("every layer", head, rows)]


def said_of_ranks(layers: Sequence[Layer]) -> str:
    """One sentence on how much of the rank is used."""
    ranks = [layer["r"] for layer in layers]
    effective = sum(layer["effective_rank"] for layer in layers) / len(layers)
    needed = sorted(layer["rank_at_energy"]["0.9"] for layer in layers)
    asked = f"{ranks[0]}" if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"
    return (
        f"{len(layers)} updates of rank {asked}: their effective rank is {effective:.1f} on "
        f"average, and {needed[len(needed) // 2]} directions hold 90 % of the energy of the "
        "median one."
    )


def _against(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    head = (
        "layer", "‖W‖", "‖ΔW‖", "‖UᵀWVᵀ‖", "of W's own", "of random", "amplification",
        "in W's top tenth", "intruders",
    )  # fmt: skip
    names = (
        "weight_norm", "update_norm", "projected", "projected_on_own", "projected_on_random",
        "amplification", "in_top_inputs",
    )  # fmt: skip
    lines = [
        [row["name"], *(_number(row[name]) for name in names), str(len(row["intruders"]))]
        for row in rows
    ]
    amplified = [row["amplification"] for row in rows if row["amplification"] is not None]
    said = (
        f"Directions that W0 has, but hardly uses, are amplified {_number(min(amplified))} to "
        f"{_number(max(amplified))} times."
        if amplified
        else "No update uses a direction that W0 has anything in."
    )
    return [
        "<h2>Against the base</h2>",
        f"<p>{html.escape(said)} ‖UᵀWVᵀ‖ is how much of W lies in the update's directions, beside "
        "W's own largest ones and random ones (LoRA, Table 7); amplification is ‖ΔW‖ over it. An "
        "intruder is one of the ten leading directions of the merged weight that has no "
        "counterpart in W.</p>",
        _folded("every layer", head, lines),
    ]


def _similarity(document: Document) -> list[str]:
    pairs = document["similarity"]
    ordered = sorted(pairs, key=lambda pair: -pair["phi"][0][0])
    head = ("layer", "φ(1, 1)", "whole spaces", "random", "distance")
    rows = [
        [
            pair["name"],
            *(_number(pair[name]) for name in ("first", "whole", "expected", "distance")),
        ]
        for pair in pairs
    ]
    first, whole, random = (
        _number(statistics.median(pair[name] for pair in pairs))
        for name in ("first", "whole", "expected")
    )
    return [
        f"<h2>The first directions share {first}, the whole spaces {whole}</h2>",
        f"<p>Medians over {len(pairs)} layers, of the matrices A; whole random spaces share "
        f"{random}. φ(i, j) is 1 where the smaller of two subspaces lies in the larger one, and "
        "max(i, j) / d for random ones.</p>",
        *drawn(
            lambda: pictures.similarities(ordered),
            "Similarity of the first i directions of one adapter with the first j of the other",
            f"φ(i, j) for the {min(pictures.SHOWN, len(pairs))} layers whose first directions are "
            "most alike; all axes count directions, the most important first. A: of the matrices A "
            "(the paper's Figure 3); ΔW: of the updates themselves; random A: the control.",
        ),
        _folded("every layer", head, rows),
    ]


def _truncated(truncated: Mapping[str, Any]) -> list[str]:
    measured = [
        f"{name}: {_number(one['before'])} before, {_number(one['after'])} after."
        for name, one in truncated.get("metrics", {}).items()
    ]
    said = (
        f"{truncated['numbers_before']:,} numbers became {truncated['numbers_after']:,}; lost is "
        f"{100 * truncated['relative_error']:.2g} % of the norm of all updates together."
    )
    return ["<h2>At lower rank</h2>", f"<p>{html.escape(' '.join([said, *measured]))}</p>"]


def _advice(advice: Mapping[str, Any]) -> list[str]:
    rows = [
        [str(one["rank"]), ", ".join(one["targets"]), _number(one["value"]), _yes(one["kept"])]
        for one in advice["tried"]
    ]
    said = (
        f"Rank {advice['rank']} on {', '.join(advice['targets'])} is enough: "
        f"{advice['metric']} {_number(advice['value'])}, the whole adapter's is "
        f"{_number(advice['full'])}, and {_number(advice['worst_allowed'])} was allowed."
    )
    return [
        "<h2>What would have been enough</h2>",
        f"<p>{html.escape(said)}</p>",
        table(("rank", "targets", advice["metric"], "kept"), rows, text=(1,)),
    ]


def _came_to_be(record: Mapping[str, Any]) -> list[str]:
    rows = [[name, _plain(value)] for name, value in record.items() if name not in TOLD]
    return (
        ["<h2>How it came to be</h2>", table(("record", "value"), rows, text=(1,))] if rows else []
    )


def _folded(name: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, behind a line to unfold where it is long."""
    made = table(head, rows)
    opened = " open" if len(rows) <= MOST_ROWS else ""
    return f"<details{opened}><summary>{html.escape(name)} ({len(rows)})</summary>{made}</details>"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_plain(one)}" for name, one in value.items())
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.3g}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
