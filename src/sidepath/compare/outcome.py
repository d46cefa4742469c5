"""What a comparison came to: the rows of its document, with intervals and paired tests."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sidepath.compare.contest import Standing
from sidepath.compare.latency import Latency
from sidepath.compare.statistics import LEVEL, Difference, difference, holm, interval

Row = dict[str, Any]


def rows_of(
    standings: Sequence[Standing],
    metric: str,
    latencies: Mapping[str, Sequence[Latency]],
) -> list[Row]:
    """A row an entrant that was trained; see `row_of`. Compared with the first of them."""
    able = [standing for standing in standings if standing.values]
    rows = [
        row_of(standing, metric, latencies.get(standing.entrant.label, ())) for standing in able
    ]
    _compare(able, rows)
    return rows


def row_of(standing: Standing, metric: str, latencies: Sequence[Latency]) -> Row:
    """One entrant: what it costs, its metric over the seeds, its sweep and its latency."""
    finals = [one for one in standing.finals.values() if "failed" not in one]
    values = standing.values
    around = interval(list(values.values())) if values else None
    return {
        "method": standing.entrant.label,
        "kind": standing.entrant.config.method,
        "settings": standing.entrant.identity()["settings"],
        **standing.facts,
        "seconds": statistics.fmean(one["seconds"] for one in finals) if finals else None,
        "peak_memory_bytes": max((one["peak_memory_bytes"] for one in finals), default=None),
        "steps": finals[0]["steps"] if finals else None,
        "learning_rate": standing.learning_rate,
        "metric": None
        if around is None
        else {"name": metric, **asdict(around), "values": list(values.values())},
        "seeds": list(values),
        "failed": [
            {"seed": seed, "reason": one["failed"]}
            for seed, one in standing.finals.items()
            if "failed" in one
        ],
        "sweep": [
            {
                "learning_rate": rate,
                "value": one.get("value"),
                "loss": one.get("loss"),
                "failed": one.get("failed"),
            }
            for rate, one in standing.sweep.items()
        ],
        "at_edge": _at_edge(standing),
        "latency": [one.as_dict() for one in latencies],
        "beside_first": None,
    }


def _at_edge(standing: Standing) -> bool:
    """Whether the best rate was the first or the last tried: a better one may lie beyond."""
    rates = standing.entrant.learning_rates
    return len(rates) > 1 and standing.learning_rate in (rates[0], rates[-1])


def _compare(standings: Sequence[Standing], rows: Sequence[Row]) -> None:
    """Put into each row but the first what parts it from the first. In place."""
    found: list[tuple[Row, Difference]] = []
    for standing, row in zip(standings[1:], rows[1:], strict=True):
        first, own = standings[0].values, standing.values
        shared = [seed for seed in own if seed in first]
        if shared:
            pair = difference([own[seed] for seed in shared], [first[seed] for seed in shared])
            found.append((row, pair))
    adjusted = holm([pair.p_t for _, pair in found])
    for (row, pair), p in zip(found, adjusted, strict=True):
        row["beside_first"] = {
            "first": rows[0]["method"],
            **asdict(pair),
            "p_t_holm": p,
            "distinguishable": p is not None and p < 1 - LEVEL,
            "verdict": verdict(pair, p),
        }


def verdict(pair: Difference, p_holm: float | None) -> str:
    """The difference in words; one that may be chance is said to be."""
    if pair.pairs < 2:
        return "one seed: nothing can be said"
    if p_holm is None:
        if pair.mean == 0:
            return "no difference in any seed"
        return f"the same difference in all {pair.pairs} seeds: no spread to hold it against"
    if p_holm < 1 - LEVEL:
        kind = "higher" if pair.mean > 0 else "lower"
        return f"{kind} (p = {p_holm:.2g})"
    return f"not distinguishable (p = {p_holm:.2g})"


def excluded(standings: Sequence[Standing]) -> list[dict[str, Any]]:
    """The entrants that did not take part or failed throughout, and why."""
    return [
        {"method": one.entrant.label, "kind": one.entrant.config.method, "reason": one.reason}
        for one in standings
        if one.reason is not None
    ]
