"""The intrinsic dimension of a task: the fewest trained numbers that do nearly as well as all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sidepath.errors import ConfigError


@dataclass(frozen=True)
class Trial:
    """One dimension that was tried."""

    d: int
    score: float
    """The task's metric, larger is better; NaN where training diverged."""
    reached: bool
    """Whether the score is the share of the full one that is asked for."""


@dataclass(frozen=True)
class Intrinsic:
    """What a search found: see `intrinsic_dimension`."""

    d: int | None
    """The smallest dimension that reached the target; None when none did."""
    share: float
    full: float
    """The score of full fine-tuning."""
    trials: tuple[Trial, ...]
    """Everything that was tried, by dimension."""

    @property
    def target(self) -> float:
        """The score to reach."""
        return self.share * self.full

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a score that is no number is null."""
        rows = [
            {
                "d": trial.d,
                "score": trial.score if math.isfinite(trial.score) else None,
                "reached": trial.reached,
            }
            for trial in self.trials
        ]
        return {
            "d": self.d,
            "share": self.share,
            "full": self.full,
            "target": self.target,
            "trials": rows,
        }

    def __str__(self) -> str:
        lines = [f"{'d':>10}  {'score':>8}  of {self.target:.4f}"]
        for trial in self.trials:
            verdict = "reached" if trial.reached else "short of it"
            lines.append(f"{trial.d:>10,}  {trial.score:8.4f}  {verdict}")
        found = "above all that were tried" if self.d is None else f"{self.d:,}"
        lines.append(f"d{100 * self.share:.0f} = {found}")
        return "\n".join(lines)


def intrinsic_dimension(
    score: Callable[[int], float],
    full: float,
    dimensions: Iterable[int],
    *,
    share: float = 0.9,
) -> Intrinsic:
    """The smallest of `dimensions` whose `score` is at least `share · full`, by bisection.

    `score(d)` trains in a subspace of d dimensions and returns the task's metric; `full` is that
    of full fine-tuning. With `share` 0.9 this is d90 (Li et al. 2018, section 2; Aghajanyan et al.
    2020, section 3): like theirs an upper bound, since training is not perfect and scores are
    taken to grow with d. Of n dimensions at most 1 + ceil(log2 n) are tried, the largest first: if
    that falls short, nothing else is tried and `d` is None. No score that is not finite reaches it.

    Errors: `ConfigError` for no dimensions, one below 1, a share outside (0, 1], or a full score
    that is not a positive number (a share of it would mean nothing).
    """
    grid = sorted(set(dimensions))
    _check(grid, full, share)
    tried: dict[int, Trial] = {}

    def reaches(d: int) -> bool:
        value = float(score(d))
        enough = share * full * (1 - 1e-12)  # a product of floats may be a hair above its value
        tried[d] = Trial(d, value, math.isfinite(value) and value >= enough)
        return tried[d].reached

    found: int | None = None
    if reaches(grid[-1]):
        low, high = 0, len(grid) - 1  # grid[high] has reached it
        while low < high:
            middle = (low + high) // 2
            if reaches(grid[middle]):
                high = middle
            else:
                low = middle + 1
        found = grid[high]
    return Intrinsic(found, share, full, tuple(tried[d] for d in sorted(tried)))


def spread(low: int, high: int, count: int) -> tuple[int, ...]:
    """`count` dimensions from `low` to `high`, each by the same factor above the last; fewer
    where rounding makes two the same.

    Errors: `ConfigError` unless 1 <= low < high and count >= 2.
    """
    if not (1 <= low < high and count >= 2):
        raise ConfigError(
            "no dimensions to search in",
            found=f"{count} from {low} to {high}",
            expected="at least 2, from 1 or more to something larger",
        )
    steps = [low * (high / low) ** (index / (count - 1)) for index in range(count)]
    return tuple(sorted({round(step) for step in steps}))


def _check(grid: Sequence[int], full: float, share: float) -> None:
    faults = []
    if not grid or grid[0] < 1:
        faults.append(f"dimensions: {list(grid)[:8]}, expected numbers of at least 1")
    if not 0 < share <= 1:
        faults.append(f"share: {share}, expected more than 0 and at most 1")
    if not (math.isfinite(full) and full > 0):
        faults.append(f"full: {full}, expected a positive number: the score of full fine-tuning")
    if faults:
        raise ConfigError("an intrinsic dimension cannot be searched for", faults=faults)
