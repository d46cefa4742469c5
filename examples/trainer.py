"""Sidepath inside `transformers.Trainer`: inject, train there, save, reload onto the base.

    python examples/trainer.py OUTPUT

Nothing of the trainer is replaced: the injected model is an ordinary model whose base is frozen.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import sidepath
from sidepath import LoRA

SOUNDS = {"cow": "moo", "cat": "meow", "dog": "woof", "duck": "quack"}
TEXTS = [f"The {animal} says {sound}." for animal, sound in SOUNDS.items()] * 8


def main(output: Path) -> None:
    """Train an adapter of the embedded base for a few steps and use it on a fresh copy."""
    torch.manual_seed(0)
    folder = sidepath.embedded_base()
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    config = LoRA(r=8, alpha=16)
    print(sidepath.plan(model, config, batch_size=8, tokens=12))
    adapter = sidepath.inject(model, config, name="sounds")

    ends = tokenizer.eos_token
    rows = [tokenizer(text + ends) for text in TEXTS]
    arguments = TrainingArguments(
        output_dir=str(output / "trainer"),
        max_steps=80,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    adapter.save(output / "sounds")

    fresh: Any = AutoModelForCausalLM.from_pretrained(folder)
    sidepath.load(fresh, output / "sounds")
    ids = torch.tensor([rows[0]["input_ids"]], device=model.device)
    with torch.no_grad():
        same = torch.equal(fresh.to(model.device).eval()(ids).logits, model.eval()(ids).logits)
    print(f"reloaded adapter, equal logits: {same}")
    prompts = [f"The {animal} says" for animal in SOUNDS]
    texts = sidepath.generate(fresh, tokenizer, prompts, max_new_tokens=8)
    for prompt, text in zip(prompts, texts, strict=True):
        print(f"{prompt}{text}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
