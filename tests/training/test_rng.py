from __future__ import annotations

import json
import random

import numpy as np
import torch

from sidepath.training.rng import RandomState

CPU = torch.device("cpu")


def draws() -> tuple[float, float, float]:
    return random.gauss(0, 1), float(np.random.normal()), float(torch.randn(()))


def test_the_run_and_its_caller_do_not_disturb_each_other() -> None:
    state = RandomState.seeded(3, CPU)
    with state.in_force(CPU):
        unbroken = [draws(), draws()]
    RandomState.seeded(9, CPU).put(CPU)
    callers = [draws(), draws()]
    RandomState.seeded(9, CPU).put(CPU)
    state = RandomState.seeded(3, CPU)
    with state.in_force(CPU):
        first = draws()
    assert draws() == callers[0]
    with state.in_force(CPU):
        second = draws()
    assert draws() == callers[1]
    assert [first, second] == unbroken


def test_through_json_and_back() -> None:
    state = RandomState.seeded(3, CPU)
    with state.in_force(CPU):
        draws()
    again = RandomState.from_dict(json.loads(json.dumps(state.as_dict())))
    with state.in_force(CPU):
        expected = [draws() for _ in range(3)]
    with again.in_force(CPU):
        assert [draws() for _ in range(3)] == expected
