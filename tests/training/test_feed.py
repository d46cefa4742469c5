from __future__ import annotations

import os
import random
import sys
from typing import Any

import numpy as np
import pytest
import torch

from sidepath.config import TrainConfig
from sidepath.data.dataset import Data, load_data
from sidepath.errors import DataError
from sidepath.training.batching import Batch
from sidepath.training.feed import Feed, _until_the_end_of
from sidepath.training.loop import train
from sidepath.training.order import Order
from tests.faults import forked
from tests.training.kit import llama, with_lora


def noisy(fields: dict[str, Any]) -> dict[str, Any]:
    """Draws from each of the three global generators."""
    drawn = f"{random.randrange(1000)}.{np.random.randint(1000)}.{int(torch.randint(1000, ()))}"
    return {**fields, "completion": fields["completion"] + drawn}


def feed_of(data: Data, rank: int = 0, count: int = 1, size: int = 6) -> Feed:
    order = Order(data.lengths, [(0, len(data), 1.0)], size=size, seed=3)
    return Feed(data, order, 2, 3, rank, count)


def contents(steps: Any) -> list[list[tuple[Any, ...]]]:
    return [[(b.rows, b.ids_BT.tolist(), b.targets_BT.tolist()) for b in step] for step in steps]


@pytest.fixture
def drawing(tokenizer: Any, pairs: Any) -> Data:
    return load_data(pairs, tokenizer, transform=noisy)


def test_workers_change_nothing(drawing: Data) -> None:
    feed = feed_of(drawing)
    here = contents(feed.steps(0, 9, workers=0))
    assert len(here) == 9
    for workers in (1, 2):
        assert contents(feed.steps(0, 9, workers)) == here
    assert contents(feed.steps(4, 9, workers=2)) == here[4:], "nor does where they begin"
    assert here[0] != here[4], "the same rows in another epoch draw other numbers"


def test_the_caller_draws_what_he_would_have_drawn(drawing: Data) -> None:
    torch.manual_seed(4)
    random.seed(4)
    expected = (float(torch.rand(())), random.random())
    torch.manual_seed(4)
    random.seed(4)
    list(feed_of(drawing).steps(0, 3, workers=1))
    assert (float(torch.rand(())), random.random()) == expected


def test_the_processes_share_each_step(drawing: Data) -> None:
    whole = feed_of(drawing)
    for step in range(8):
        rows = sorted(row for batch in whole[step] for row in batch.rows)
        dealt = [feed_of(drawing, rank, 3)[step] for rank in range(3)]
        assert sorted(row for mine in dealt for batch in mine for row in batch.rows) == rows
        assert sum(batch.weight for mine in dealt for batch in mine) == sum(
            batch.weight for batch in whole[step]
        )


def test_a_process_without_rows_makes_an_idle_pass(drawing: Data) -> None:
    dealt = [feed_of(drawing, rank, 4, size=2)[0] for rank in range(4)]
    assert [[batch.weight > 0 for batch in mine] for mine in dealt] == [
        [True],
        [True],
        [False],
        [False],
    ]
    idle: Batch = dealt[3][0]
    assert (idle.rows, idle.tokens, idle.weight) == ((), 0, 0)


def broken(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "completion": "" if fields["prompt"].endswith("9=") else "x"}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_cannot_be_used_is_named(tokenizer: Any, pairs: Any, workers: int) -> None:
    feed = feed_of(load_data(pairs, tokenizer, transform=broken))
    with pytest.raises(DataError, match=r"row (10|20)") as caught:
        list(feed.steps(0, 4, workers))
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_over_drawing_data_resumes_to_the_bit(
    drawing: Data, tmp_path: Any, workers: int
) -> None:
    config = TrainConfig(
        steps=7, batch_size=3, learning_rate=1e-2, checkpoint_every=1, workers=workers
    )
    model = with_lora(llama(), dropout=0.2)
    whole = [r.loss for r in train(model, drawing, config, checkpoints=tmp_path / "whole")]
    cut = with_lora(llama(), dropout=0.2)
    steps = train(cut, drawing, config, checkpoints=tmp_path / "cut")
    first = [next(steps).loss for _ in range(3)]
    steps.close()
    again = with_lora(llama(), dropout=0.2)
    rest = [
        r.loss for r in train(again, drawing, config, checkpoints=tmp_path / "cut", resume=True)
    ]
    assert first + rest == whole
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


@pytest.mark.skipif(sys.platform != "linux", reason="who sent a signal is told on Linux only")
def test_a_worker_whose_run_is_gone_before_it_looks_ends() -> None:
    """Torch's watchdog takes whoever is the parent then for the run, and waits for ever."""
    killed_before = 2**22 + 1  # above the largest process number

    def worker() -> None:
        _until_the_end_of(killed_before)
        os._exit(7)

    assert forked(worker) == 0
