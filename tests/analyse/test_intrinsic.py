"""The search for the intrinsic dimension, on scores that are known."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from sidepath.analyse.intrinsic import intrinsic_dimension, spread
from sidepath.errors import ConfigError


@pytest.mark.parametrize("needed", [1, 2, 37, 64, 99, 100])
def test_it_is_the_smallest_that_reaches_the_target_in_few_trials(needed: int) -> None:
    tried = []

    def score(d: int) -> float:
        tried.append(d)
        return 0.72 if d >= needed else 0.71

    found = intrinsic_dimension(score, 0.8, range(1, 101))
    assert found.d == needed
    assert len(tried) == len(set(tried)) <= 1 + math.ceil(math.log2(100))
    assert [trial.d for trial in found.trials] == sorted(tried)
    assert all(trial.reached == (trial.d >= needed) for trial in found.trials)


def test_out_of_reach_is_said_after_one_trial() -> None:
    found = intrinsic_dimension(lambda d: 0.1, 0.8, (10, 100))
    assert found.d is None
    assert [trial.d for trial in found.trials] == [100]
    assert "above all that were tried" in str(found)


def test_a_run_that_diverged_reaches_nothing() -> None:
    found = intrinsic_dimension(lambda d: math.nan if d < 50 else 1.0, 1.0, (10, 50, 100))
    assert found.d == 50
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["trials"][0]["score"] is None
    assert "d90 = 50" in str(found)


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"dimensions": ()}, "dimensions"),
        ({"dimensions": (0, 5)}, "dimensions"),
        ({"full": 0.0}, "full"),
        ({"full": math.nan}, "full"),
        ({"share": 1.5}, "share"),
    ],
)
def test_bad_questions(more: dict[str, Any], word: str) -> None:
    settings: dict[str, Any] = {"full": 1.0, "dimensions": (1, 2), "share": 0.9} | more
    with pytest.raises(ConfigError) as caught:
        intrinsic_dimension(lambda d: 1.0, **settings)
    assert [fault.partition(":")[0] for fault in caught.value.faults] == [word]


def test_a_grid_grows_by_one_factor() -> None:
    assert spread(100, 1600, 5) == (100, 200, 400, 800, 1600)
    assert spread(1, 3, 9) == (1, 2, 3)
    with pytest.raises(ConfigError, match="no dimensions"):
        spread(5, 5, 3)
