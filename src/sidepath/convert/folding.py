"""Many ranks and scales as one, for formats that have room for one (floor 5).

Rows of zeros in A and columns of zeros in B change nothing of `B A`; a factor between two scales
goes into B. Padding is exact. A factor is exact where its product fits the data type, else B is
widened to float32; where even that has to round, it is rounded once, and said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sidepath.convert.portable import Update
from sidepath.store.peft_config import commonest


@dataclass(frozen=True)
class Folded:
    """Updates that share what a format has room for only once."""

    updates: Mapping[str, Update]
    rounded: tuple[str, ...]
    """The paths whose B had to be rounded for it."""

    def notes(self) -> list[str]:
        """What the user should know of it."""
        if not self.rounded:
            return []
        return [
            f"{len(self.rounded)} of {len(self.updates)} updates have another scale than the "
            f"commonest one: the factor between them went into B, rounded once to float32 "
            f"({', '.join(self.rounded[:3])}{', ...' if len(self.rounded) > 3 else ''})"
        ]


def one_scaling(updates: Mapping[str, Update]) -> Folded:
    """Every update at the commonest scaling `s`; ranks stay as they are."""
    return _at(
        updates, {path: commonest(one.scaling for one in updates.values()) for path in updates}
    )


def one_alpha(updates: Mapping[str, Update]) -> Folded:
    """Every update at the commonest alpha, its scaling being `alpha / r` at its own rank r."""
    alpha = commonest(one.alpha for one in updates.values())
    return _at(updates, {path: alpha / one.r for path, one in updates.items()})


def one_rank(updates: Mapping[str, Update], r: int | None = None) -> dict[str, Update]:
    """Every update at one rank, the largest or `r`: padded with zeros. Scalings stay."""
    r = r or max(one.r for one in updates.values())
    return {path: _padded(one, r) for path, one in updates.items()}


def _padded(one: Update, r: int) -> Update:
    if one.r == r:
        return one
    more = r - one.r
    return replace(one, A=F.pad(one.A, (0, 0, 0, more)), B=F.pad(one.B, (0, more)))


def _at(updates: Mapping[str, Update], scalings: Mapping[str, float]) -> Folded:
    folded, rounded = {}, []
    for path, one in updates.items():
        B, exact = times(one.B, one.scaling / scalings[path])
        folded[path] = replace(one, B=B, scaling=scalings[path])
        if not exact:
            rounded.append(path)
    return Folded(folded, tuple(rounded))


def times(B: Tensor, factor: float) -> tuple[Tensor, bool]:
    """B with each number times `factor`, and whether that is exact.

    In B's data type if nothing is lost there, else in float32.
    """
    if factor == 1.0:
        return B, True
    wide = B.double() * factor
    for dtype in (B.dtype, torch.float32):
        narrow = wide.to(dtype)
        if torch.equal(narrow.double(), wide):
            return narrow, True
    return narrow, False
