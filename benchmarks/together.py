"""Two adapters trained in one pass over one base, against two runs one after the other.

    python benchmarks/together.py [--rows 1 2 4 8 16] [--steps 12] [--rounds 7]

The embedded base with the demo's restaurant and SQL tasks (LoRA r=5, all linear layers). Both
ways take the same steps on the same rows; the ratio is of tokens a second.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import interleaved, machine, markdown, ratios, show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures = [measure(rows, options.steps, options.rounds) for rows in options.rows]
    head = ["rows a step of each", "one after the other / together", "min", "max", "tokens/s"]
    cells = [
        [
            figure["rows"],
            f"{figure['ratio']['median']:.2f}",
            f"{figure['ratio']['min']:.2f}",
            f"{figure['ratio']['max']:.2f}",
            f"{figure['tokens_per_second']:,.0f}",
        ]
        for figure in figures
    ]
    show({"machine": machine(), "figures": figures}, machine(), markdown(head, cells))


def measure(rows: int, steps: int, rounds: int) -> dict[str, Any]:
    """The ratio at one batch size."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import sidepath
    from sidepath.demo.tasks import make_tasks
    from sidepath.training.together import train_together

    folder = sidepath.embedded_base()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tasks = {task.name: task for task in make_tasks(train_rows=400, test_rows=4)}
    runs = {}
    for name in ("restaurant", "sql"):
        torch.manual_seed(0)
        sidepath.inject(model, sidepath.LoRA(r=5, alpha=10), name=name)
        data = sidepath.load_data(tasks[name].train, tokenizer, max_tokens=256)
        config = sidepath.TrainConfig(steps=steps, batch_size=rows, learning_rate=1e-4)
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

    seconds = interleaved({"apart": apart, "together": together}, rounds=rounds, warmup=1)
    return {
        "rows": rows,
        "ratio": ratios(seconds["apart"], seconds["together"]),
        "tokens_per_second": tokens / statistics.median(seconds["together"]),
    }


if __name__ == "__main__":
    main()
