"""Which rows of the data come from which source, and how often each source is drawn from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sidepath.errors import DataError


@dataclass(frozen=True)
class Portion:
    """The rows [start, stop) of `Data.examples` that come from one source."""

    name: str
    """The source's name, as messages give it."""
    start: int
    stop: int
    weight: float = 1.0
    """Share of an epoch's rows that is drawn from here; the portions' weights sum to 1. Where
    none are given it is the share of the rows, so that an epoch holds each row once."""
    unit: str = "line"
    """What `Example.line` counts: "line" or "row"."""

    def __len__(self) -> int:
        return self.stop - self.start


def portion_of(parts: Sequence[Portion], row: int) -> Portion:
    """The portion that holds a row."""
    return next(part for part in parts if part.start <= row < part.stop)


def shares(weights: Sequence[float] | None, counts: Sequence[int]) -> list[float]:
    """The weight of each portion, their sum 1: as given, or else by the number of rows.

    Raises:
        DataError: not one weight a source, or a weight that is not a positive number.
    """
    if weights is None:
        return [count / max(1, sum(counts)) for count in counts]
    if len(weights) != len(counts):
        raise DataError(
            "weights: not one for each source of data",
            found=f"{len(weights)} weights for {len(counts)} sources",
        )
    wrong = [weight for weight in weights if not (math.isfinite(weight) and weight > 0)]
    if wrong:
        raise DataError(
            "weights: impossible value",
            found=", ".join(str(weight) for weight in wrong),
            expected="numbers above 0 (a source that is not wanted is not named)",
        )
    return [weight / sum(weights) for weight in weights]


def portions(
    sources: Sequence[tuple[str, str]], counts: Sequence[int], weights: Sequence[float] | None
) -> tuple[Portion, ...]:
    """The portions of rows that lie one source after the other; `sources` are (name, unit)."""
    made: list[Portion] = []
    start = 0
    for (name, unit), count, share in zip(sources, counts, shares(weights, counts), strict=True):
        made.append(Portion(name, start, start + count, share, unit))
        start += count
    return tuple(made)


def regrouped(
    parts: Sequence[Portion], rows: Sequence[int], *, weighted: bool
) -> tuple[list[int], tuple[Portion, ...]]:
    """`rows` with those of one portion together (else in the order given), and the portions.

    A portion that keeps no row is left out. Weights that were given (`weighted`) stay in
    proportion, others follow the rows that are left.
    """
    chosen = np.asarray(rows, dtype=np.int64)
    of = np.searchsorted([part.stop for part in parts], chosen, side="right")
    ordered = chosen[np.argsort(of, kind="stable")].tolist()
    counts = np.bincount(of, minlength=len(parts)).tolist()
    kept = [(part, count) for part, count in zip(parts, counts, strict=True) if count]
    return ordered, portions(
        [(part.name, part.unit) for part, _ in kept],
        [count for _, count in kept],
        [part.weight for part, _ in kept] if weighted else None,
    )
