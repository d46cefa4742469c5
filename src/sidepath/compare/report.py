"""A comparison for people: tables, notes, Markdown, and the files it leaves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sidepath.compare.picture import picture
from sidepath.errors import in_one_line
from sidepath.page import has_matplotlib
from sidepath.store.file import publish_file

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
        f"{one['method']} took no part: {in_one_line(one['reason'])}"
        for one in document["excluded"]
    ]
    if any(one["form"] == "merged" for row in document["rows"] for one in row["latency"]):
        told.append(
            "latency: a merged adapter runs the base's own operators, so that where its ratio is "
            "not 1, the machine's noise is"
        )
    edge = [row["method"] for row in document["rows"] if row["at_edge"]]
    if edge:
        told.append(
            f"best rate at the sweep's edge (a better one may lie beyond): {', '.join(edge)}"
        )
    told += [
        f"{row['method']}: seed {one['seed']} failed: {in_one_line(one['reason'])}"
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
    """Write document, Markdown and (with matplotlib) the picture; the names of what was written.

    Each file is replaced whole. Errors: `StoreError`, `WriteFailed`.
    """
    files = {
        JSON: (json.dumps(document, indent=2) + "\n").encode(),
        MARKDOWN: markdown(document).encode(),
    }
    if has_matplotlib() and any(row["metric"] for row in document["rows"]):
        files[PICTURE] = picture(document)
    for name, content in files.items():
        with publish_file(folder / name, overwrite=True) as file:
            file.write_bytes(content)
    return list(files)
