from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sidepath.config import TrainConfig
from sidepath.training.optim import (
    clip_gradients,
    gradient_norm,
    learning_rate,
    make_optimizer,
    set_learning_rate,
)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedule(schedule: str) -> None:
    config = TrainConfig(learning_rate=1.0, warmup=0.2, schedule=schedule)  # type: ignore[arg-type]
    rates = [learning_rate(config, step, 10) for step in range(1, 11)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[2] == 1.0
    assert all(rate > 0 for rate in rates)
    shapes = {
        "constant": [1.0] * 8,
        "linear": [1 - at / 8 for at in range(8)],
        "cosine": [0.5 + 0.5 * math.cos(math.pi * at / 8) for at in range(8)],
    }
    assert rates[2:] == pytest.approx(shapes[schedule])


@pytest.mark.parametrize(("warmup", "total"), [(0.0, 1), (1.0, 4), (0.06, 3)])
def test_schedule_at_its_limits(warmup: float, total: int) -> None:
    config = TrainConfig(learning_rate=1.0, warmup=warmup)
    rates = [learning_rate(config, step, total) for step in range(1, total + 1)]
    assert all(0 < rate <= 1 for rate in rates)
    assert max(rates) == 1.0


def test_adamw_is_the_papers_and_decays_matrices_only() -> None:
    torch.manual_seed(0)
    parameters = {
        "matrix": nn.Parameter(torch.randn(3, 2, dtype=torch.float64)),
        "bias": nn.Parameter(torch.randn(3, dtype=torch.float64)),
    }
    config = TrainConfig(learning_rate=0.1, weight_decay=0.5, beta1=0.8, beta2=0.9)
    optimizer = make_optimizer(parameters, config)
    expected = {name: p.detach().clone() for name, p in parameters.items()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step in range(1, 4):
        for name, parameter in parameters.items():
            gradient = torch.full_like(parameter, 0.3 * step) * torch.sign(expected[name])
            parameter.grad = gradient
            decay = 0.5 if name == "matrix" else 0.0
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.9 * second[name] + 0.1 * gradient**2
            mean, square = first[name] / (1 - 0.8**step), second[name] / (1 - 0.9**step)
            expected[name] = expected[name] * (1 - 0.1 * decay)
            expected[name] = expected[name] - 0.1 * mean / (square.sqrt() + 1e-8)
        optimizer.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach(), expected[name])


@pytest.mark.parametrize(("largest", "wanted"), [(1.0, 1.0), (100.0, 13.0), (0.0, 13.0)])
def test_clipping_by_global_norm(largest: float, wanted: float) -> None:
    one, two = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    one.grad, two.grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
    norm = gradient_norm([one, two])
    assert float(norm) == 13.0
    clip_gradients([one, two], largest, norm)
    assert float(gradient_norm([one, two])) == pytest.approx(wanted, rel=1e-5)


def test_each_group_keeps_its_multiple_of_the_rate() -> None:
    """LoRA+: B moves at a multiple of A's rate, through the whole schedule."""
    parameters = {
        "q.A": nn.Parameter(torch.zeros(2, 3)),
        "q.B": nn.Parameter(torch.zeros(3, 2)),
        "q.bias": nn.Parameter(torch.zeros(3)),
    }
    config = TrainConfig(learning_rate=0.01, weight_decay=0.1)
    plain = make_optimizer(parameters, config)
    assert [group["lr"] for group in plain.param_groups] == [0.01, 0.01]
    optimizer = make_optimizer(parameters, config, {"q.B": 16.0})
    of = {name: group for group in optimizer.param_groups for name, parameter in parameters.items()
          if any(parameter is member for member in group["params"])}  # fmt: skip
    assert {name: group["lr"] for name, group in of.items()} == {
        "q.A": 0.01, "q.B": 0.16, "q.bias": 0.01,
    }  # fmt: skip
    assert (of["q.B"]["weight_decay"], of["q.bias"]["weight_decay"]) == (0.1, 0.0)
    set_learning_rate(optimizer, 0.5)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {name: float(parameter.detach().flatten()[0]) for name, parameter in parameters.items()}
    # Adam's first step is the rate itself (decay acts on zeros).
    assert moved == pytest.approx({"q.A": -0.5, "q.B": -8.0, "q.bias": -0.5}, rel=1e-4)
