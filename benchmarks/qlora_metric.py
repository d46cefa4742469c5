"""LoRA over a base in float32, bfloat16 and NF4: the metric, the memory and the seconds.

Two tasks: the demo's SQL task on the embedded base (exact match, as the demo trains it) and
MiniLM on SST-2 (dev accuracy). The same rows and seeds whatever the base is in; each run is a
process of its own, so that its peak of resident memory is its own.

    python benchmarks/qlora_metric.py [--task sql] [--seeds 3] [--rows 6000]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import machine, markdown, need, show

FORMS = {"float32": ("float32", "none"), "bfloat16": ("bfloat16", "none"), "NF4": ("auto", "nf4")}
"""How the base is held: its dtype and how it is quantised."""


def sql(form: str, seed: int, _: argparse.Namespace) -> tuple[Any, float, float]:
    """The demo's SQL task: the trained model, its exact match in percent, the steps' seconds."""
    import torch

    import sidepath
    from sidepath import TrainConfig
    from sidepath.base import embedded_base
    from sidepath.cli.bases import load_causal, load_tokenizer
    from sidepath.demo.run import LORA, MAX_TOKENS
    from sidepath.demo.tasks import make_tasks

    task = next(task for task in make_tasks(seed=0) if task.name == "sql")
    dtype, quantise = FORMS[form]
    model = load_causal(embedded_base(), dtype, "cpu", quantise)
    tokenizer = load_tokenizer(embedded_base())
    data, test = (
        sidepath.load_data(rows, tokenizer, max_tokens=MAX_TOKENS)
        for rows in (task.train, task.test)
    )
    torch.manual_seed(seed)
    sidepath.inject(model, LORA, name="sql")
    config = TrainConfig(
        steps=task.steps,
        batch_size=task.batch_size,
        learning_rate=task.lora_learning_rate,
        seed=seed,
    )
    seconds = sum(step.seconds for step in sidepath.train(model, data, config))
    found = sidepath.evaluate(
        model, test, metrics=["exact_match"], batch_size=64, max_new_tokens=task.max_new_tokens
    )
    return model, 100 * found["exact_match"], seconds


def sst2(form: str, seed: int, arguments: argparse.Namespace) -> tuple[Any, float, float]:
    """MiniLM on SST-2: the trained model, its dev accuracy in percent, the steps' seconds."""
    import torch

    import sidepath
    from minilm_sst2 import COLUMNS, FOLDER, LORA, subset
    from sidepath import TrainConfig
    from sidepath.cli.bases import load_classifier, load_tokenizer

    tokenizer = load_tokenizer(FOLDER)
    folder = need("data", "glue", "SST-2")
    data = sidepath.load_data(
        subset(folder / "train.tsv", arguments.rows), tokenizer, columns=COLUMNS, max_tokens=64
    )
    dev = sidepath.load_data(folder / "dev.tsv", tokenizer, columns=COLUMNS, labels=data.labels)
    dtype, quantise = FORMS[form]
    torch.manual_seed(seed)
    model, _ = load_classifier(FOLDER, data.labels, data.pad_id, dtype, "cpu", quantise)
    sidepath.inject(model, LORA, name="sst2")
    config = TrainConfig(epochs=1.0, batch_size=32, learning_rate=2e-3, seed=seed)
    seconds = sum(step.seconds for step in sidepath.train(model, data, config))
    found = sidepath.evaluate(model, dev, metrics=["accuracy"])
    return model, 100 * found["accuracy"], seconds


TASKS = {"sql": sql, "sst2": sst2}


def one_run(arguments: argparse.Namespace) -> None:
    """A run in this process; prints what it found as JSON."""
    import torch

    from qlora import linear_bytes

    torch.set_num_threads(arguments.threads)
    model, metric, seconds = TASKS[arguments.task](arguments.form, arguments.seed, arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"metric": metric, "seconds": seconds, "peak": peak, "linear": linear_bytes(model)}
    print(json.dumps(found))


def runs_of(task: str, form: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All seeds of one task over one form of its base."""
    found = []
    for seed in range(arguments.seeds):
        words = ["--task", task, "--form", form, "--seed", seed, "--rows", arguments.rows]
        command = [sys.executable, str(Path(__file__)), *map(str, words)]
        command += ["--threads", str(arguments.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return {
        "task": task,
        "base": form,
        "metric": statistics.mean(run["metric"] for run in found),
        "values": [run["metric"] for run in found],
        "linear_bytes": found[0]["linear"],
        "peak_memory_bytes": max(run["peak"] for run in found),
        "seconds": statistics.median(run["seconds"] for run in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--form", choices=FORMS, help="one run in this process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.form is not None:
        one_run(arguments)
        return
    tasks = TASKS if arguments.task is None else [arguments.task]
    rows = [runs_of(task, form, arguments) for task in tasks for form in FORMS]
    table = markdown(
        ("task", "base in", "metric", "seeds", "linear layers MiB", "peak MiB", "seconds"),
        [
            (
                row["task"],
                row["base"],
                f"{row['metric']:.2f}",
                ", ".join(f"{value:.2f}" for value in row["values"]),
                f"{row['linear_bytes'] / 2**20:.2f}",
                f"{row['peak_memory_bytes'] / 2**20:.0f}",
                f"{row['seconds']:.0f}",
            )
            for row in rows
        ],
    )
    show({"machine": machine(), "settings": vars(arguments), "rows": rows}, table)


if __name__ == "__main__":
    main()
