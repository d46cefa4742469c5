"""The audit: what is in the data, counted before the first step."""

from __future__ import annotations

import dataclasses
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
        figures = self._figures()
        width = max(len(name) for name, _ in figures)
        lines = [f"{name:<{width}} {value}" for name, value in figures]
        lines += [f"row {number}: {text}" for number, text in enumerate(self.samples, start=1)]
        return "\n".join(lines)

    def _figures(self) -> list[tuple[str, str]]:
        figures = [
            ("rows", f"{self.rows:,} of {self.rows_read:,} read"),
            ("tokens", f"{self.tokens:,}, longest row {self.longest:,} of {self.max_tokens:,}"),
            ("supervised", f"{self.supervised_share:.1%}"),
        ]
        if self.end_token_share is not None:
            figures.append(("end supervised", f"{self.end_token_share:.1%} of rows"))
        if len(self.portions) > 1:
            figures += [
                (f"from {part.name}", f"{len(part):,} rows, weight {part.weight:.1%}")
                for part in self.portions
            ]
        for label, count in self.labels.items():
            figures.append((f"label {label}", f"{count:,}"))
        figures += [
            ("truncated", f"{self.truncated:,}"),
            ("duplicates", f"{self.duplicates:,}"),
            ("empty (dropped)", f"{self.empty:,}"),
            ("over-long (dropped)", f"{self.over_long:,}"),
        ]
        return figures

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
