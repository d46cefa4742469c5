"""Two adapters trained in one pass over one base, against two runs one after the other.

    python benchmarks/together.py [--rows 1 2 4 8] [--adapters 2] [--task sql] [--dtype float32]

The embedded base with adapters (LoRA r=5, all linear layers) that each learn other rows of one of
the demo's tasks. Both ways take the same steps on the same rows; the ratio is of tokens a second.

The bound beside it: one adapter on as many rows as all have together, against one after the other.
That is what a larger batch gives on this machine; adapters of their own can only cost more.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import interleaved, machine, markdown, ratios, show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--adapters", type=int, default=2)
    parser.add_argument("--task", default="sql", choices=["restaurant", "sql", "sentiment"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures = [measure(rows, options) for rows in options.rows]
    head = [
        "rows a step of each",
        "one after the other / together",
        "min",
        "max",
        "bound",
        "tokens/s",
    ]
    cells = [
        [
            figure["rows"],
            f"{figure['ratio']['median']:.2f}",
            f"{figure['ratio']['min']:.2f}",
            f"{figure['ratio']['max']:.2f}",
            f"{figure['bound']['median']:.2f}",
            f"{figure['tokens_per_second']:,.0f}",
        ]
        for figure in figures
    ]
    show({"machine": machine(), "figures": figures}, machine(), markdown(head, cells))


def measure(rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """The ratio at one batch size."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import sidepath
    from sidepath.demo.tasks import make_tasks
    from sidepath.training.together import train_together

    folder = sidepath.embedded_base()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype))
    runs = {}
    for number in range(options.adapters):
        torch.manual_seed(number)
        name = f"adapter-{number}"
        sidepath.inject(model, sidepath.LoRA(r=5, alpha=10, dtype=options.dtype), name=name)
        tasks = make_tasks(seed=number, train_rows=400, test_rows=4)
        task = next(task for task in tasks if task.name == options.task)
        data = sidepath.load_data(task.train, tokenizer, max_tokens=256)
        config = sidepath.TrainConfig(steps=options.steps, batch_size=rows, learning_rate=1e-4)
        runs[name] = (data, config)
    tokens = 0

    def apart() -> None:
        nonlocal tokens
        tokens = 0
        for name, (data, config) in runs.items():
            for report in sidepath.train(model, data, config, adapter=name):
                tokens += report.tokens

    def together() -> None:
        for _ in train_together(model, runs):
            pass

    def one_of_all_rows() -> None:
        data, config = runs["adapter-0"]
        wide = dataclasses.replace(config, batch_size=rows * options.adapters)
        for _ in sidepath.train(model, data, wide, adapter="adapter-0"):
            pass

    ways = {"apart": apart, "together": together, "bound": one_of_all_rows}
    seconds = interleaved(ways, rounds=options.rounds, warmup=1)
    return {
        "rows": rows,
        "ratio": ratios(seconds["apart"], seconds["together"]),
        "bound": ratios(seconds["apart"], seconds["bound"]),
        "tokens_per_second": tokens / statistics.median(seconds["together"]),
    }


if __name__ == "__main__":
    main()
