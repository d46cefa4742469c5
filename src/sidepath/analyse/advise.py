"""The smallest adapter that does as well: from one that is trained, without a sweep.

An update's leading directions are the nearest update of lower rank, so that the metric of the
truncated adapter bounds what training at that rank would reach from below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sidepath.analyse.spectrum import Factors, spectrum
from sidepath.errors import ConfigError

Score = Callable[[int, Sequence[str]], float]
"""The metric of the adapter cut to a rank, with updates of these kinds of matrices alone."""


@dataclass(frozen=True)
class Tried:
    """One smaller adapter, and how it did."""

    rank: int
    kinds: tuple[str, ...]
    value: float
    kept: bool
    """Whether its metric is within the tolerance."""


@dataclass(frozen=True)
class Advice:
    """What is enough: see `advise`."""

    rank: int
    kinds: tuple[str, ...]
    full: float
    """The metric of the whole adapter."""
    worst: float
    """The worst value that is within the tolerance."""
    tried: tuple[Tried, ...]
    """In the order of the search."""

    @property
    def value(self) -> float:
        """The metric of the adapter that is advised."""
        chosen = (self.rank, self.kinds)
        values = [one.value for one in self.tried if (one.rank, one.kinds) == chosen]
        return values[-1] if values else self.full

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "rank": self.rank,
            "targets": list(self.kinds),
            "value": self.value,
            "full": self.full,
            "worst_allowed": self.worst,
            "tried": [
                {"rank": one.rank, "targets": list(one.kinds), "value": one.value, "kept": one.kept}
                for one in self.tried
            ],
        }


def kind_of(path: str) -> str:
    """What a module is called in its block: the last part of its path."""
    return path.rpartition(".")[2]


def energy_of_kinds(layers: Mapping[str, Factors]) -> dict[str, float]:
    """Each kind's share of the sum of ‖ΔW‖² over all layers, the largest first."""
    energies: dict[str, float] = {}
    for path, factors in layers.items():
        kind = kind_of(path)
        energies[kind] = energies.get(kind, 0.0) + spectrum(factors).norm ** 2
    total = math.fsum(energies.values()) or 1.0
    ordered = sorted(energies.items(), key=lambda item: -item[1])
    return {kind: energy / total for kind, energy in ordered}


def ranks_below(r: int) -> tuple[int, ...]:
    """1, 2, 4, ... and r itself."""
    return tuple(sorted({*(1 << power for power in range(r.bit_length()) if 1 << power < r), r}))


def advise(
    score: Score,
    full: float,
    r: int,
    kinds: Sequence[str],
    *,
    tolerance: float,
    higher_is_better: bool = True,
) -> Advice:
    """The smallest rank, then the fewest kinds of matrices, that keep the metric.

    `full` is the metric of the whole adapter of rank `r` over `kinds`, ordered by energy, the
    largest first; kept is a metric at most `tolerance` worse, in the metric's own unit. Of the
    ranks 1, 2, 4, ... r the smallest that keeps it is found by bisection (more directions are
    taken to do no harm). Then kinds are left out at that rank, the one of least energy first,
    as long as the metric is kept. `score` is called at most log2(log2 r) + 2 times for the rank
    and once for each kind.

    Errors: `ConfigError` for a tolerance below 0, or a `full` that is not finite.
    """
    if not (tolerance >= 0 and math.isfinite(full)):
        raise ConfigError(
            "no advice from these",
            found=f"tolerance {tolerance}, full {full}",
            expected="a tolerance of at least 0 and a finite metric",
        )
    worst = full - tolerance if higher_is_better else full + tolerance
    search = _Search(score, worst, higher_is_better)
    rank = search.smallest_rank(ranks_below(r), kinds)
    chosen = search.fewest_kinds(rank, kinds)
    return Advice(rank, tuple(chosen), full, worst, tuple(search.tried))


@dataclass
class _Search:
    """Smaller adapters, tried one after another."""

    score: Score
    worst: float
    higher_is_better: bool
    tried: list[Tried] = field(default_factory=list)

    def keeps(self, rank: int, kinds: Sequence[str]) -> bool:
        """Whether the adapter cut to this keeps the metric."""
        value = self.score(rank, kinds)
        near = 1e-12 * max(1.0, abs(self.worst))  # a sum of floats may be a hair off
        kept = value >= self.worst - near if self.higher_is_better else value <= self.worst + near
        self.tried.append(Tried(rank, tuple(kinds), value, kept))
        return kept

    def smallest_rank(self, ranks: Sequence[int], kinds: Sequence[str]) -> int:
        """The first of the rising ranks that keeps it, by bisection; the last one does."""
        low, high = 0, len(ranks) - 1
        while low < high:
            middle = (low + high) // 2
            if self.keeps(ranks[middle], kinds):
                high = middle
            else:
                low = middle + 1
        return ranks[high]

    def fewest_kinds(self, rank: int, kinds: Sequence[str]) -> list[str]:
        """The kinds that are left when those that are not needed went, the last one first."""
        chosen = list(kinds)
        for kind in reversed(kinds):
            fewer = [one for one in chosen if one != kind]
            if fewer and self.keeps(rank, fewer):
                chosen = fewer
        return chosen
