"""TRL's `SFTTrainer`, unmodified, trains an injected model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.interplay.conftest import Subject

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*:UserWarning",
    "ignore:.gradient_checkpointing.*deprecated:FutureWarning",
)

TEXTS = [{"text": letter * 9} for letter in "abcdab" * 4]
PAIRS = [{"prompt": f"{at}=", "completion": "xyz"[at % 3] * 6} for at in range(24)]


def trainer_of(
    model: Any, tokenizer: Any, folder: Path, rows: list[dict[str, str]], **options: Any
) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    settings = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-2,
        "logging_steps": 1,
        "save_steps": 8,
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "max_length": 64,
        **options,
    }
    return SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(folder), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (TEXTS, {"gradient_checkpointing": False}),
        (TEXTS, {"gradient_checkpointing": True}),
        (PAIRS, {"bf16": True, "completion_only_loss": True}),
        (PAIRS, {"packing": True, "packing_strategy": "wrapped"}),
    ],
    ids=["plain", "gradient checkpointing", "completions in bf16", "packed"],
)
def test_it_trains_the_adapter_alone(
    subject: Subject,
    tokenizer: Any,
    tmp_path: Path,
    rows: list[dict[str, str]],
    options: dict[str, Any],
) -> None:
    trainer = trainer_of(subject.model, tokenizer, tmp_path / "out", rows, **options)
    assert trainer.model is subject.model
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.1
    assert (tmp_path / "out" / "checkpoint-8" / "model.safetensors").is_file()
    subject.take_back_from(trainer)
    subject.check_only_the_adapter_moved()
    subject.check_saved_and_reloaded(tmp_path / "adapter")
