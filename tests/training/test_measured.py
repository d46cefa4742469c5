"""The peak of real steps, and that measuring them changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import sidepath
from sidepath import LoRA, TrainConfig
from sidepath.data.dataset import load_data
from sidepath.store.live import LiveBytes, held_tensors, storage_bytes
from sidepath.training.loop import train
from sidepath.training.measured import Peak, peak_bytes, watched
from sidepath.training.report import StepReport
from tests.training.kit import llama, with_lora


def test_live_bytes_are_counted_by_storage() -> None:
    held = torch.zeros(100)
    with LiveBytes([held, held.view(10, 10)]) as count:
        assert count.live == count.peak == 400
        made = torch.ones(50)
        again = made.view(5, 10)
        assert count.live == 600, "a view has no storage of its own"
        del made
        assert count.live == 600, "and keeps its storage alive"
        del again
        assert count.live == 400
        torch.ones(200).sum()
        assert (count.live, count.peak) == (400, 400 + 800 + 4)
    torch.ones(1000)
    assert count.peak == 1204, "what happens outside does not count"


def test_peak_bytes_of_a_block() -> None:
    model = llama()
    with peak_bytes(model) as peak:
        made = torch.empty(10_000)
    assert peak.bytes == storage_bytes(held_tensors(model)) + made.nbytes
    assert "live tensors" in peak.how


def test_watched_steps_are_the_same_steps(tokenizer: Any, pairs: list[dict[str, str]]) -> None:
    data = load_data(pairs, tokenizer)
    config = TrainConfig(steps=4, batch_size=24)

    def losses(watching: bool) -> tuple[list[float], Peak]:
        model, peak = with_lora(llama(), dropout=0.2), Peak()
        steps: Iterator[StepReport] = train(model, data, config)
        if watching:
            steps = watched(steps, model, peak)
        return [step.loss for step in steps], peak

    plain, nothing = losses(watching=False)
    seen, peak = losses(watching=True)
    assert plain == seen
    assert nothing.bytes == 0
    audit = data.audit
    # Of a full row: shorter ones are padded, and padding is no target.
    share = audit.supervised_share * audit.tokens / (audit.rows * audit.longest)
    planned = sidepath.plan(
        llama(),
        LoRA(r=2, targets=("q_proj", "v_proj"), dropout=0.2),
        batch_size=24,
        tokens=data.audit.longest,
        supervised=share,
    )
    assert planned.memory.total == pytest.approx(peak.bytes, rel=0.15)


def test_only_the_first_steps_are_counted_and_the_loop_is_closed() -> None:
    closed = []

    def steps() -> Iterator[int]:
        try:
            for number in range(10):
                torch.empty(1000 * (number + 1))
                yield number
        finally:
            closed.append(True)

    model, peak = llama(), Peak()
    held = storage_bytes(held_tensors(model))
    for number in watched(steps(), model, peak, first=3):
        torch.empty(10**6)  # the caller's own
        if number == 5:
            break
    assert peak.bytes == held + 4 * 3000
    import gc

    gc.collect()
    assert closed == [True]
    assert list(watched(iter([1, 2]), model, peak)) == [1, 2]
