"""How adapters are combined, and how one is extracted: settings, checked (floor 6).

Nothing here may import torch: the command line's help reads these classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sidepath.config import check, require
from sidepath.errors import ConfigError

Kind = Literal["concatenate", "svd", "ties", "dare", "dare-ties"]
ELEMENTWISE = ("ties", "dare", "dare-ties")
"""Kinds that look at the elements of each update."""
_KEPT: Mapping[str, float] = {"ties": 0.2, "dare": 0.5, "dare-ties": 0.5}


@dataclass(frozen=True, kw_only=True)
class Combination:
    """How adapters become one. Negative weights subtract (task arithmetic, arXiv 2212.04089)."""

    kind: Kind = "concatenate"
    """`concatenate`: the weighted sum of the updates, exactly; ranks add up. `svd`: the nearest
    to it of a lower rank. `ties`: small elements are trimmed, each element's sign is elected, and
    those that agree are averaged (arXiv 2306.01708). `dare`: elements are dropped at random, the
    others rescaled, then summed (arXiv 2311.03099); `dare-ties`: dropped so, then elected and
    averaged. These three look at whole matrices, one at a time, and need a rank to come back to;
    a layer that one adapter alone adapts is left as it is."""
    weights: tuple[float, ...] | None = None
    """Weight of each adapter, in their order; 1 each when not given."""
    layer_weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Other weights for the layers that match a pattern, as in `*.mlp.*=1,0.5`; the last match
    wins, give the flag again for more."""
    r: int | None = None
    """Largest rank of a layer's update."""
    energy: float | None = None
    """Share of a layer's energy (the sum of squares) that the fewest directions have to hold."""
    density: float | None = None
    """Share of an update's elements that is kept; when not given 0.2 for ties (the paper's), 0.5
    for dare."""
    seed: int = 0
    """Seed of what is dropped, and of the decomposition of large matrices."""

    def __post_init__(self) -> None:
        check(self)
        require(
            self,
            {
                "weights": self.weights is None or len(self.weights) > 0,
                "r": self.r is None or self.r >= 1,
                "energy": self.energy is None or 0 < self.energy <= 1,
                "density": self.density is None or 0 < self.density <= 1,
            },
        )
        cut = self.r is not None or self.energy is not None
        rules = {
            f"{self.kind} needs a rank to come back to: r, energy, or both": self.kind
            != "concatenate"
            and not cut,
            "concatenate keeps every rank: r and energy belong to svd": self.kind == "concatenate"
            and cut,
            f"density says nothing to {self.kind}": self.density is not None
            and self.kind not in ELEMENTWISE,
        }
        if faults := [said for said, broken in rules.items() if broken]:
            raise ConfigError("this is no combination", faults=faults)

    @property
    def kept(self) -> float:
        """The share of an update's elements that is kept."""
        return _KEPT.get(self.kind, 1.0) if self.density is None else self.density


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """How the difference of two checkpoints becomes an adapter."""

    r: int | None = None
    """Largest rank of a layer's update."""
    energy: float | None = None
    """Share of a layer's change (its sum of squares) that the fewest directions have to hold."""
    targets: tuple[str, ...] = ("all-linear",)
    """Modules whose change becomes an update, as for LoRA: a preset (all-linear, attention, mlp), a
    name, or a glob on the dotted name."""
    exclude: tuple[str, ...] = ()
    """Modules left out of the targets, in the same form."""
    whole: bool = False
    """Save what else has changed (norms, biases, embeddings, heads) whole, so that nothing of the
    change is lost but the updates' errors; else it is listed and left out."""
    seed: int = 0
    """Seed of the decomposition of large matrices."""

    def __post_init__(self) -> None:
        check(self)
        require(
            self,
            {
                "r": self.r is None or self.r >= 1,
                "energy": self.energy is None or 0 < self.energy <= 1,
                "targets": len(self.targets) > 0,
            },
        )
        if self.r is None and self.energy is None:
            raise ConfigError("extracting needs a rank: r, energy, or both")
        if parts := [target for target in self.targets if ":" in target]:
            raise ConfigError(
                "an update is extracted of whole matrices",
                found=", ".join(parts),
                hint="name the fused projection without its parts",
            )
