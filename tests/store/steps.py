"""Real training steps on full batches, as the training loop takes them, for memory tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sidepath.config import TrainConfig
from sidepath.store.live import held_tensors, storage_bytes
from sidepath.training.batching import IGNORED, Batch
from sidepath.training.loss import batch_loss
from sidepath.training.optim import clip_gradients, gradient_norm, make_optimizer
from sidepath.training.trained import opened, trained_of


def full_batch(
    model: Any, batch_size: int, tokens: int, *, supervised: float = 1.0, padded: bool = True
) -> Batch:
    """Random rows, the last share of each supervised; padded: one row is a token shorter."""
    ids_BT = torch.randint(3, model.config.vocab_size, (batch_size, tokens))
    mask_BT, targets_BT = torch.ones_like(ids_BT), ids_BT.clone()
    targets_BT[:, : tokens - int(supervised * tokens)] = IGNORED
    if padded:
        mask_BT[0, -1], targets_BT[0, -1] = 0, IGNORED
    classify = "Classification" in type(model).__name__
    labels_B = torch.zeros(batch_size, dtype=torch.long) if classify else None
    rows = tuple(range(batch_size))
    count = ids_BT.numel()
    return Batch(ids_BT, mask_BT, None, targets_BT, labels_B, rows, count, count)


@contextmanager
def steps_of(
    model: Any, batch: Batch, *, checkpointing: bool, autocast: bool = False
) -> Iterator[Callable[[], None]]:
    """A function that takes one step of the training loop with the model's active adapter."""
    trained = trained_of(model, None)
    parameters = list(trained.parameters.values())
    optimizer = make_optimizer(trained.parameters, TrainConfig())

    def step() -> None:
        model.train()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = batch_loss(model, batch) / batch.weight
        loss.backward()  # type: ignore[no-untyped-call]
        clip_gradients(parameters, 1.0, gradient_norm(parameters))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with opened([trained], TrainConfig(gradient_checkpointing=checkpointing)):
        yield step


def allocator_peak(model: Any, run: Callable[[], None]) -> int:
    """The peak while `run` runs by the events of the CPU's allocator (torch's profiler)."""
    from torch.profiler import ProfilerActivity, profile

    held = storage_bytes(held_tensors(model))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events, "the profiler saw no allocation"
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return held + peak


def resident_growth(batch_size: int, tokens: int) -> None:
    """Print how far two steps raise this process's resident memory, and what was predicted.

    Run in a process of its own (`tests/store/test_memory.py`). Linux only.
    """
    from pathlib import Path

    import sidepath
    from tests.store.test_memory import ALL, mid_llama

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

    model = mid_llama()
    predicted = sidepath.plan(model, ALL, batch_size=batch_size, tokens=tokens).memory.total
    sidepath.inject(model, ALL)
    held = storage_bytes(held_tensors(model))
    with steps_of(model, full_batch(model, 1, 8), checkpointing=False) as step:
        step()  # loads what torch loads on first use
    batch = full_batch(model, batch_size, tokens)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    with steps_of(model, batch, checkpointing=False) as step:
        step()
        step()
    print(status("VmHWM") - before, predicted - held)
