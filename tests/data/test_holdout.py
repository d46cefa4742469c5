from __future__ import annotations

import numpy as np
import pytest

from sidepath.data.holdout import held_out
from sidepath.data.portions import Portion
from sidepath.errors import TrainError


def reference(families: list[int], share: float, seed: int) -> set[int]:
    """One portion, with a dictionary of families."""
    members: dict[int, list[int]] = {}
    for row, family in enumerate(families):
        members.setdefault(family, []).append(row)
    order = np.random.default_rng([seed, len(families)]).permutation(len(members))
    held: set[int] = set()
    for family in order.tolist():
        if len(held) >= max(1, round(share * len(families))):
            break
        held.update(list(members.values())[family])
    return held


@pytest.mark.parametrize("seed", range(4))
def test_one_portion_against_the_reference(seed: int) -> None:
    drawn = np.random.default_rng(seed).integers(0, 40, 200)
    _, first, families = np.unique(drawn, return_index=True, return_inverse=True)
    families = np.argsort(np.argsort(first))[families]
    held = held_out(families, (Portion("a", 0, 200),), 0.15, seed=seed)
    assert set(np.flatnonzero(held).tolist()) == reference(families.tolist(), 0.15, seed)


def test_each_portion_gives_its_share_and_families_stay_whole() -> None:
    families = np.concatenate([np.repeat(np.arange(50), 2), np.arange(40, 70)])
    parts = (Portion("a", 0, 100), Portion("b", 100, 130))
    held = held_out(families, parts, 0.2, seed=1)
    assert held[:100].sum() >= 20
    assert held[100:].sum() >= 6
    for family in range(70):
        assert len(set(held[families == family].tolist())) == 1


def test_a_portion_that_would_be_empty_is_named() -> None:
    families = np.array([0, 1, 2, 3, 3])
    parts = (Portion("a", 0, 3), Portion("b", 3, 5))
    with pytest.raises(TrainError, match="no row is left") as caught:
        held_out(families, parts, 0.3, seed=0)
    assert caught.value.where == "b"
    assert caught.value.found == "2 rows, 1 different prompts"
