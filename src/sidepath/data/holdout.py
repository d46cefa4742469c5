"""Which rows are held out of training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sidepath.data.portions import Portion
from sidepath.errors import TrainError


def held_out(
    families: NDArray[np.int64], parts: Sequence[Portion], share: float, *, seed: int
) -> NDArray[np.bool_]:
    """Which rows to hold out: about `share` of each portion's rows, at least one.

    `families` numbers each row's family (from 0, by first appearance), and a family is held
    out whole or not at all. The same seed gives the same rows.

    Raises:
        TrainError: a portion would keep no row to train on.
    """
    count = int(families.max()) + 1
    order = np.random.default_rng([seed, len(families)]).permutation(count)
    by_family = np.argsort(families, kind="stable")
    bounds = np.searchsorted(families[by_family], np.arange(count + 1))
    held = np.zeros(len(families), dtype=np.bool_)
    for part in parts:
        inside = held[part.start : part.stop]
        wanted = max(1, round(share * len(part)))
        missing = wanted - int(inside.sum())
        for family in order.tolist():
            if missing <= 0:
                break
            rows = by_family[bounds[family] : bounds[family + 1]]
            own = int(((rows >= part.start) & (rows < part.stop)).sum())
            if own and not held[rows[0]]:
                held[rows] = True
                missing -= own
    _require_rest(held, families, parts)
    return held


def _require_rest(
    held: NDArray[np.bool_], families: NDArray[np.int64], parts: Sequence[Portion]
) -> None:
    """Checked at the end: a family held out for one portion may have rows in another."""
    for part in parts:
        if held[part.start : part.stop].all():
            different = len(np.unique(families[part.start : part.stop]))
            raise TrainError(
                "no row is left to train on after holding rows out",
                where=part.name,
                found=f"{len(part)} rows, {different} different prompts",
                hint="give more rows, or evaluation data of their own",
            )
