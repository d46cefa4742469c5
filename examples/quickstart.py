"""The whole way in one script: look, adapt, train, save, load, compare, merge.

    python examples/quickstart.py OUTPUT

It runs on the base in the package; put the folder of your own model in the place of
`sidepath.embedded_base()`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sidepath
from sidepath import LoRA, TrainConfig

SOUNDS = {"cow": "moo", "cat": "meow", "dog": "woof", "duck": "quack"}
ROWS = [
    {"prompt": f"The {animal} says", "completion": f" {sound}."} for animal, sound in SOUNDS.items()
]


def main(output: Path) -> None:
    """Teach the base four sounds, and prove that nothing else has changed."""
    torch.manual_seed(0)
    folder = sidepath.embedded_base()
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    config = LoRA(r=8, alpha=16)
    print(sidepath.plan(model, config, batch_size=4, tokens=12))
    adapter = sidepath.inject(model, config, name="sounds")
    data = sidepath.load_data(ROWS, tokenizer, max_tokens=32)
    for step in sidepath.train(
        model, data, TrainConfig(steps=60, batch_size=4, learning_rate=5e-3)
    ):
        if step.number % 20 == 0:
            print(f"step {step.number}: loss {step.loss:.4f}")

    prompts = [row["prompt"] for row in ROWS]
    learned = sidepath.generate(model, tokenizer, prompts, max_new_tokens=6)
    for prompt, text in zip(prompts, learned, strict=True):
        print(f"{prompt}{text}")
    adapter.save(output / "sounds", metrics={"loss": step.loss})

    fresh: Any = AutoModelForCausalLM.from_pretrained(folder)
    sidepath.load(fresh, output / "sounds")
    reloaded = sidepath.generate(fresh, tokenizer, prompts, max_new_tokens=6)
    merged = sidepath.merge_folder(folder, [output / "sounds"], output / "merged")
    assert merged.parity is not None
    print(f"reloaded adapter, equal answers: {reloaded == learned}")
    print(f"merged model, largest difference: {merged.parity.max_abs:.1e}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
