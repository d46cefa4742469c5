"""A real pre-trained Llama of 260,032 parameters learns E2E: does the base matter?

Three runs on the same rows and steps, dev loss and BLEU (several references a prompt) after
each: LoRA r=8 on all linear layers; the same over weights drawn at random; full fine-tuning.

    python benchmarks/stories_e2e.py [--steps 600]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sidepath
from common import machine, markdown, need, show
from sidepath import LoRA, TrainConfig

COLUMNS = {"prompt": "mr", "completion": "ref"}
LORA = LoRA(r=8, alpha=16, targets=("all-linear",))


def redrawn(model: torch.nn.Module) -> torch.nn.Module:
    """The same architecture with every weight drawn again, as an untrained model has them."""
    torch.manual_seed(0)
    return type(model)(model.config)  # type: ignore[call-arg, arg-type]


def runs(base: Any, arguments: argparse.Namespace) -> Iterator[tuple[str, torch.nn.Module, float]]:
    """Name, model ready to train, and peak learning rate of each run."""
    base_folder = need("models", "stories260K")
    for name, model in (("LoRA r=8", base), ("LoRA r=8, random weights", redrawn(base))):
        torch.manual_seed(0)
        sidepath.inject(model, LORA, name="e2e")
        yield name, model, arguments.lora_rate
    yield "full fine-tuning", AutoModelForCausalLM.from_pretrained(base_folder), arguments.full_rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--train-rows", type=int, default=None)
    parser.add_argument("--dev-rows", type=int, default=1000)
    parser.add_argument("--lora-rate", type=float, default=1e-2)
    parser.add_argument("--full-rate", type=float, default=2e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    folder = need("models", "stories260K")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = sidepath.load_data(
        need("data", "e2e", "trainset.csv"),
        tokenizer,
        columns=COLUMNS,
        max_tokens=384,
        limit=arguments.train_rows,
    )
    dev = sidepath.load_data(
        need("data", "e2e", "devset.csv"),
        tokenizer,
        columns=COLUMNS,
        max_tokens=384,
        limit=arguments.dev_rows,
    )
    base = AutoModelForCausalLM.from_pretrained(folder)
    untrained = sidepath.evaluate(base, dev, metrics=["loss", "bleu"], max_new_tokens=96)
    rows: list[dict[str, Any]] = [{"run": "the base, not adapted", "trainable": 0, **untrained}]
    for name, model, rate in runs(base, arguments):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        config = TrainConfig(
            steps=arguments.steps, batch_size=arguments.batch_size, learning_rate=rate
        )
        seconds = 0.0
        for step in sidepath.train(model, data, config):
            seconds += step.seconds
        found = sidepath.evaluate(model, dev, metrics=["loss", "bleu"], max_new_tokens=96)
        count = sum(parameter.numel() for parameter in trained)
        rows.append({"run": name, "trainable": count, "rate": rate, "seconds": seconds, **found})
    table = markdown(
        ("run", "trained", "learning rate", "dev loss", "BLEU", "seconds"),
        [
            (
                row["run"],
                f"{row['trainable']:,}",
                row.get("rate", "-"),
                f"{row['loss']:.3f}",
                f"{row['bleu']:.1f}",
                f"{row['seconds']:.0f}" if "seconds" in row else "-",
            )
            for row in rows
        ],
    )
    show({"machine": machine(), "settings": vars(arguments), "rows": rows}, table)


if __name__ == "__main__":
    main()
