"""What LoRA's options promise of training: LoRA+, rank-stabilised scaling, ranks above the size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidepath.config import TrainConfig
from sidepath.core.views import view_of
from sidepath.data.dataset import load_data
from sidepath.errors import ConfigError
from sidepath.methods.base import Method, Site
from sidepath.methods.lora import LoRA
from sidepath.methods.vera import VeRA
from sidepath.store.adapter import inject
from sidepath.training.loop import train
from sidepath.training.optim import make_optimizer
from sidepath.training.trained import trained_of
from tests.conftest import tiny_bert, tiny_gpt2, tiny_llama
from tests.training.kit import llama


def problem() -> tuple[nn.Linear, Tensor, Tensor, float]:
    """A layer, a regression with noise on 40 rows, and the least loss any matrix reaches."""
    torch.manual_seed(2)
    layer = nn.Linear(8, 6, bias=False).double()
    x = torch.randn(40, 8, dtype=torch.float64)
    y = x @ torch.randn(8, 6, dtype=torch.float64) + 0.3 * torch.randn(40, 6, dtype=torch.float64)
    best = torch.linalg.lstsq(x, y).solution
    return layer, x, y, float(F.mse_loss(x @ best, y))


def descend(model: Callable[[], Tensor], parameters: list[nn.Parameter], y: Tensor) -> float:
    """The loss after 2000 steps of Adam, its rate falling to zero."""
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for step in range(2000):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 2000)
        optimizer.zero_grad()
        loss = F.mse_loss(model(), y)
        loss.backward()
        optimizer.step()
    return float(F.mse_loss(model(), y).detach())


@pytest.mark.parametrize("r", [6, 20])
def test_full_rank_reaches_what_training_the_matrix_reaches(r: int) -> None:
    """R = min(O, I) spans every update; a rank above the matrix's size is allowed and adds none."""
    layer, x, y, least = problem()
    view = view_of(layer)
    assert view is not None
    layer.weight.requires_grad_(False)
    delta = LoRA(r=r, alpha=r, dtype="base").dense_delta(Site("layer", "dense"), view)
    low_rank = descend(lambda: delta(x, view), list(delta.parameters()), y)
    free = nn.Parameter(layer.weight.detach().clone())
    full = descend(lambda: F.linear(x, free), [free], y)
    assert full == pytest.approx(least, rel=1e-6)
    assert low_rank == pytest.approx(full, rel=1e-4)
    if r > 6:
        return
    narrow = LoRA(r=2, alpha=2, dtype="base").dense_delta(Site("layer", "dense"), view)
    short = descend(lambda: narrow(x, view), list(narrow.parameters()), y)
    assert short > 1.5 * full, "a rank that is too small does not"


def one_step(r: int, scaling: str, optimizer: Callable[..., Any], seed: int) -> float:
    """Size of the side path's output after one step from B = 0, on one row."""
    torch.manual_seed(seed)
    layer = nn.Linear(1024, 16, bias=False)
    view = view_of(layer)
    assert view is not None
    config = LoRA(r=r, alpha=16, scaling=scaling)  # type: ignore[arg-type]
    delta = config.dense_delta(Site("layer", "dense"), view)
    x = torch.randn(1, 1024)
    moves = optimizer(delta.parameters(), lr=1e-3)
    delta(x, view).sum().backward()
    moves.step()
    return float((delta(x, view) - layer(x)).detach().abs().mean())


@pytest.mark.parametrize(
    ("scaling", "optimizer", "grows"),
    [
        ("alpha/sqrt(r)", torch.optim.SGD, 1.0),
        ("alpha/r", torch.optim.SGD, 1 / 16),
        ("alpha/r", torch.optim.Adam, 1.0),
        ("alpha/sqrt(r)", torch.optim.Adam, 4.0),
    ],
)
def test_the_first_step_against_the_rank(
    scaling: str, optimizer: Callable[..., Any], grows: float
) -> None:
    """From B = 0 one step moves the output by `s² r` under SGD and by `s r` under Adam, so that
    which scaling is flat in the rank depends on the optimiser (Kalajdzievski, 2023, looks at SGD).
    """
    wide, thin = (
        sum(one_step(r, scaling, optimizer, seed) for seed in range(16)) for r in (1024, 64)
    )
    assert wide / thin == pytest.approx(grows, rel=0.2)


def test_b_moves_at_its_own_rate_and_nothing_else_does() -> None:
    model = tiny_bert()
    config = LoRA(r=2, b_rate=16, targets=("query", "word_embeddings"), bias="lora",
                  train_whole=("classifier",))  # fmt: skip
    inject(model, config, "a")
    rates = trained_of(model, "a").rates
    assert set(rates.values()) == {16.0}
    assert sorted(rates) == [
        f"bert.encoder.layer.{layer}.attention.self.query.B" for layer in (0, 1)
    ]
    dora = tiny_llama()
    inject(dora, LoRA(r=2, b_rate=4, dora=True, targets=("q_proj",)), "a")
    assert len(trained_of(dora, "a").rates) == 2
    assert trained_of(dora, "a").parameters.keys() >= trained_of(dora, "a").rates.keys()


def test_a_ratio_of_one_is_plain_lora_to_the_bit_and_another_is_not() -> None:
    ends = {}
    for ratio in (None, 1.0, 4.0):
        model, ids = tiny_gpt2(), torch.arange(3, 13)[None]
        torch.manual_seed(1)
        config = LoRA(r=2) if ratio is None else LoRA(r=2, b_rate=ratio)
        inject(model, config, "a")
        trained = trained_of(model, "a")
        optimizer = make_optimizer(
            trained.parameters, TrainConfig(learning_rate=1e-2), trained.rates
        )
        for _ in range(3):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
        ends[ratio] = trained.snapshot()
    assert all(torch.equal(ends[1.0][name], tensor) for name, tensor in ends[None].items())
    assert not any(
        torch.equal(ends[4.0][name], tensor)
        for name, tensor in ends[None].items()
        if name.endswith(".B")
    )


@pytest.mark.parametrize("rate", [0.0, -1.0, 1e7])
def test_impossible_rates(rate: float) -> None:
    with pytest.raises(ConfigError, match="b_rate"):
        LoRA(b_rate=rate)


FAMILY: dict[str, Method] = {
    "dora and lora+": LoRA(r=2, dora=True, b_rate=8.0, dropout=0.1),
    "pissa": LoRA(r=2, start="pissa", dropout=0.1),
    "vera": VeRA(r=8, dropout=0.1),
}


@pytest.mark.parametrize("name", FAMILY)
def test_a_resumed_run_ends_with_the_unbroken_runs_bits(
    name: str, tokenizer: Any, pairs: Any, tmp_path: Path
) -> None:
    data = load_data(pairs, tokenizer)
    config = TrainConfig(steps=5, batch_size=3, learning_rate=1e-2, checkpoint_every=1)

    def fresh() -> nn.Module:
        model: nn.Module = llama()
        torch.manual_seed(5)
        inject(model, FAMILY[name], "a")
        return model

    whole, broken, resumed = fresh(), fresh(), fresh()
    losses = [report.loss for report in train(whole, data, config, checkpoints=tmp_path / "whole")]
    assert len(set(losses)) == 5
    steps = train(broken, data, config, checkpoints=tmp_path / "broken")
    assert [next(iter(steps)).loss for _ in range(2)] == losses[:2]
    steps.close()  # type: ignore[attr-defined]
    after = train(resumed, data, config, checkpoints=tmp_path / "broken", resume=True)
    assert [report.loss for report in after] == losses[2:]
    expected = whole.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in resumed.state_dict().items())
