from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from sidepath.data.rng import derived


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


def test_the_place_decides_what_is_drawn() -> None:
    with derived(3, 1, 0):
        first = [draw(), draw()]
    random.seed(8)
    torch.manual_seed(9)
    with derived(3, 1, 0):
        assert [draw(), draw()] == first
    drawn = set()
    for place in ((3, 1, 1), (3, 2, 0), (4, 1, 0), (3, 1), (1, 3, 0)):
        with derived(*place):
            drawn.add(draw())
    assert len(drawn | {first[0]}) == 6


def test_the_callers_state_is_left_alone() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    expected = [draw(), draw()]
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    first = draw()
    with derived(5):
        draw()
    assert [first, draw()] == expected
    random.seed(1)
    state = random.getstate()
    with pytest.raises(ZeroDivisionError), derived(5):
        _ = random.random() / 0
    assert random.getstate() == state
