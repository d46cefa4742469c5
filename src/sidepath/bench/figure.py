"""A figure: ways of doing one thing, measured beside one another, and what they should come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sidepath.bench.timing import Spread, quotients

OURS, PEER = "ours", "PEFT"
PEER_OVER_OURS = f"{PEER} / {OURS}"
Unit = Literal["seconds", "bytes", "calls"]


@dataclass(frozen=True)
class Target:
    """What a figure is to reach."""

    limit: float
    at_least: bool = False

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"

    def met_by(self, value: float) -> bool:
        """Whether a value reaches it."""
        return value >= self.limit if self.at_least else value <= self.limit


def at_most(limit: float) -> Target:
    """A target that a value reaches from below: seconds, bytes, and ratios of ours to others."""
    return Target(limit)


def at_least(limit: float) -> Target:
    """A target that a value reaches from above: ratios of others to ours."""
    return Target(limit, at_least=True)


Targets = Mapping[str, Target]
"""By what they are set for: `ours / floor`, a ratio of two ways, or `ours`, one way's value."""


@dataclass(frozen=True)
class Comparison:
    """One line of a figure: a ratio of two ways, or one way's own value, against its target."""

    of: str
    spread: Spread
    target: Target | None = None

    @property
    def is_ratio(self) -> bool:
        """Whether it is a ratio of two ways."""
        return " / " in self.of

    @property
    def reached(self) -> bool | None:
        """Whether the median reaches the target; None without one."""
        return None if self.target is None else self.target.met_by(self.spread.median)


@dataclass(frozen=True)
class Figure:
    """What was measured under one name."""

    name: str
    what: str
    """What is measured, in one line: model, dtype, shape of the batch."""
    unit: Unit
    ways: Mapping[str, Spread]
    """By the way's name: `ours`, `PEFT` where it is installed, `floor`, `base`, `full`, ..."""
    comparisons: tuple[Comparison, ...]
    reference: str | None = None
    """The way whose value counts as 1 in the picture; None where values stand for themselves."""
    bound: float | None = None
    """The ratio to the reference that no way can get below, where it is known."""
    notes: tuple[str, ...] = ()
    peak_bytes: Mapping[str, int] = field(default_factory=dict)
    """The most memory allocated on a GPU by each way."""

    @property
    def ratio(self) -> Spread | None:
        """The peer's value over ours (above 1: ours needs less); None without the peer."""
        found = [one.spread for one in self.comparisons if one.of == PEER_OVER_OURS]
        return found[0] if found else None

    def as_dict(self) -> dict[str, Any]:
        """The figure as the JSON document holds it."""
        spread, peer = self.ratio, self.ways.get(PEER)
        nothing = {"median": None, "min": None, "max": None}
        return {
            "name": self.name,
            "what": self.what,
            "unit": self.unit,
            "ours": self.ways[OURS].median,
            "peer": None if peer is None else peer.median,
            "ratio": {"of": PEER_OVER_OURS, **(nothing if spread is None else asdict(spread))},
            "ways": {name: asdict(way) for name, way in self.ways.items()},
            "comparisons": [_line(one) for one in self.comparisons],
            "reference": self.reference,
            "bound": self.bound,
            "notes": list(self.notes),
            "peak_bytes": dict(self.peak_bytes),
        }


def _line(one: Comparison) -> dict[str, Any]:
    target = None if one.target is None else str(one.target)
    return {"of": one.of, **asdict(one.spread), "target": target, "reached": one.reached}


def figure_of(
    name: str,
    what: str,
    samples: Mapping[str, Sequence[float]],
    targets: Targets,
    *,
    unit: Unit = "seconds",
    reference: str | None = None,
    bound: float | None = None,
    notes: Sequence[str] = (),
    peak_bytes: Mapping[str, int] | None = None,
    also: Sequence[str] = (),
) -> Figure:
    """The figure of these measurements; the n-th ones of all ways are neighbours.

    Compared are the ways that the targets name, ours and the peer with the reference, and the
    peer with ours, and what `also` names; comparisons with ways that were not measured (no peer
    installed) are left out.
    """
    wanted = [*targets, PEER_OVER_OURS, *also]
    if reference is not None:
        wanted += [f"{OURS} / {reference}", f"{PEER} / {reference}"]
    lines = []
    for of in sorted(set(wanted), key=wanted.index):
        names = of.split(" / ")
        if len(set(names)) == len(names) and all(way in samples for way in names):
            values = [samples[way] for way in names]
            spread = quotients(*values) if len(values) == 2 else Spread.of(values[0])
            lines.append(Comparison(of, spread, targets.get(of)))
    ways = {way: Spread.of(values) for way, values in samples.items()}
    return Figure(
        name, what, unit, ways, tuple(lines), reference, bound, tuple(notes), peak_bytes or {}
    )
