"""What watching a run costs (`--watch 1`: a look at every step) as a share of a step's time.

Two runs of one kind, one watched and one not, take their steps in turn. The looks are timed by
themselves too: they cost less than what neighbouring steps differ by.

    python benchmarks/watch_cost.py [--base embedded|llama-110m] [--rows 16] [--rounds 40]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import sidepath
from common import interleaved, machine, markdown, ratios, show
from sidepath.bench.models import make
from sidepath.demo.tasks import make_tasks
from sidepath.training.watch import Watch

ROWS = {"embedded": 16, "llama-110m": 4}
"""Rows of a step when none are asked for."""
WARMUP = 3


def model_of(name: str) -> nn.Module:
    """A fresh model; the large one is random."""
    from transformers import AutoModelForCausalLM

    if name == "llama-110m":
        return make("llama", "float32", torch.device("cpu"))
    loaded: nn.Module = AutoModelForCausalLM.from_pretrained(sidepath.embedded_base())
    return loaded


def steps_of(name: str, rows: int, steps: int, watch: int) -> Iterator[Any]:
    """The steps of a run over the demo's question-to-SQL rows: LoRA r=8, all linear layers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sidepath.embedded_base())
    model = model_of(name)
    adapter = sidepath.inject(model, sidepath.LoRA(r=8, targets=("all-linear",)), name="watched")
    task = next(task for task in make_tasks(seed=0) if task.name == "sql")
    data = sidepath.load_data(task.train, tokenizer, max_tokens=256)
    config = sidepath.TrainConfig(steps=steps, batch_size=rows, learning_rate=1e-4, watch=watch)
    return iter(sidepath.train(model, data, config, adapter=adapter.name))


@contextmanager
def timed_looks() -> Iterator[list[float]]:
    """Within the block, the seconds of every call of a `Watch` that looks."""
    seconds: list[float] = []

    def timed(method: Callable[..., None]) -> Callable[..., None]:
        def call(watch: Watch, *arguments: Any) -> None:
            began = time.perf_counter()
            method(watch, *arguments)
            if watch.every:
                seconds.append(time.perf_counter() - began)

        return call

    with ExitStack() as stack:
        for name in ("see_gradients", "see_step"):
            stack.enter_context(patch.object(Watch, name, timed(getattr(Watch, name))))
        yield seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="embedded", choices=sorted(ROWS))
    parser.add_argument("--rows", type=int)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    rows, steps = asked.rows or ROWS[asked.base], asked.rounds + WARMUP
    ways = {"watched": 1, "plain": 0}
    with timed_looks() as looks:
        runs = {name: steps_of(asked.base, rows, steps, watch) for name, watch in ways.items()}
        actions = {name: (lambda run=run: next(run)) for name, run in runs.items()}
        seconds = interleaved(actions, rounds=asked.rounds, warmup=WARMUP)
    each = [one + other for one, other in zip(looks[::2], looks[1::2], strict=True)][WARMUP:]
    shares = [look / step for look, step in zip(each, seconds["watched"], strict=True)]
    found = {
        "base": asked.base,
        "rows": rows,
        "step_seconds": statistics.median(seconds["plain"]),
        "look_seconds": statistics.median(each),
        "look_over_step": {
            "median": statistics.median(shares),
            "min": min(shares),
            "max": max(shares),
        },
        "watched_over_plain": ratios(seconds["watched"], seconds["plain"]),
        "machine": machine(),
    }
    table = markdown(["measure", "median", "min", "max"], [
        [key, *(f"{found[key][one]:.4f}" for one in ("median", "min", "max"))]
        for key in ("look_over_step", "watched_over_plain")
    ])  # fmt: skip
    show(found, f"{asked.base}, {rows} rows a step, {found['machine']}", table)


if __name__ == "__main__":
    main()
