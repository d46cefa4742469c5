"""The audit: what is in the data, counted before the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sidepath.data.portions import Portion
from sidepath.errors import DataError


@dataclass(frozen=True)
class Audit:
    """What training would see of the data; nothing is dropped or cut without standing here."""

    task: str
    """"causal" or "classify"."""
    rows_read: int
    """Rows in the source."""
    rows: int
    """Rows kept for training."""
    tokens: int
    """Tokens of the kept rows, padding not counted."""
    supervised_share: float
    """Share of the tokens that are targets; for classification the share of rows with a label."""
    end_token_share: float | None
    """Share of the rows whose last target ends the text; None for classification."""
    truncated: int
    """Rows kept but cut to `max_tokens` (prompts from the left, plain text from the right)."""
    duplicates: int
    """Rows equal to an earlier one, token for token; they are kept."""
    empty: int
    """Rows dropped: nothing in them to learn."""
    over_long: int
    """Rows dropped: the completion alone does not fit into `max_tokens`."""
    longest: int
    """Tokens of the longest kept row."""
    max_tokens: int
    """The limit that was in force."""
    labels: dict[str, int]
    """Rows of each class; empty for causal data."""
    portions: tuple[Portion, ...]
    """Where the rows come from, and the share of an epoch drawn from each source."""
    samples: tuple[str, ...]
    """Rows as the model sees them, targets between ⟦ and ⟧; long ones without their middle."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as `train --json` prints them."""
        return {
            **dataclasses.asdict(self),
            "portions": [
                {"name": part.name, "rows": len(part), "weight": part.weight}
                for part in self.portions
            ],
            "samples": list(self.samples),
        }

    def __str__(self) -> str:
        figures = told(self.as_dict())
        width = max(len(name) for name, _ in figures)
        lines = [f"{name:<{width}} {value}" for name, value in figures]
        lines += [f"row {number}: {text}" for number, text in enumerate(self.samples, start=1)]
        return "\n".join(lines)

    def require_trainable(self, *, ends_expected: bool) -> None:
        """Raise a `DataError` when training on these data could teach nothing, or never to stop."""
        faults = []
        if self.rows == 0 or self.supervised_share == 0:
            faults.append("0 % of the tokens are supervised: there is nothing to learn")
        if ends_expected and not self.end_token_share:
            faults.append("no row supervises an end token: the model would never learn to stop")
        if faults:
            raise DataError(
                "the audit refuses these data",
                faults=faults,
                found=f"{self.rows} rows, {self.truncated} truncated, {self.over_long} over-long",
                hint="raise max_tokens, or look at the rows the audit shows",
            )


def told(audit: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures of an audit, given as `Audit.as_dict` gives it, for people."""
    rows = f"{audit['rows']:,} of {audit['rows_read']:,} read"
    longest = f"longest row {audit['longest']:,} of {audit['max_tokens']:,}"
    figures = [
        ("rows", rows),
        ("tokens", f"{audit['tokens']:,}, {longest}"),
        ("supervised", f"{audit['supervised_share']:.1%}"),
    ]
    if audit["end_token_share"] is not None:
        figures.append(("end supervised", f"{audit['end_token_share']:.1%} of rows"))
    portions = audit["portions"]
    for part in portions if len(portions) > 1 else []:
        figures.append(
            (f"from {part['name']}", f"{part['rows']:,} rows, weight {part['weight']:.1%}")
        )
    figures += [(f"label {label}", f"{count:,}") for label, count in audit["labels"].items()]
    dropped = {"empty": "empty (dropped)", "over_long": "over-long (dropped)"}
    for name in ("truncated", "duplicates", *dropped):
        figures.append((dropped.get(name, name), f"{audit[name]:,}"))
    return figures
