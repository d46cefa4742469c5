"""`transformers.Trainer`, unmodified, trains an injected model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import sidepath
from tests.interplay.conftest import Subject
from tests.training.kit import llama

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*:UserWarning",
    "ignore:.gradient_checkpointing.*deprecated:FutureWarning",
)


def rows() -> list[dict[str, torch.Tensor]]:
    """Sixteen rows that repeat one of three letters."""
    made = []
    for at in range(16):
        ids = torch.tensor([0] + [5 + at % 3] * 8 + [1])
        made.append({"input_ids": ids, "labels": ids.clone()})
    return made


def trainer_of(model: Any, folder: Path, **options: Any) -> Trainer:
    settings = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-2,
        "logging_steps": 1,
        "save_steps": 4,
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        "seed": 1,
        **options,
    }
    arguments = TrainingArguments(output_dir=str(folder), **settings)
    return Trainer(model=model, args=arguments, train_dataset=rows())


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5},
    ],
    ids=["plain", "gradient checkpointing", "bf16", "accumulation"],
)
def test_it_trains_the_adapter_alone(
    subject: Subject, tmp_path: Path, options: dict[str, Any]
) -> None:
    trainer = trainer_of(subject.model, tmp_path / "out", **options)
    trainer.train()
    losses = losses_of(trainer)
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.1
    state = trainer.optimizer.optimizer.state_dict()["state"]
    assert len(state) == len(subject.trained()), "moments for the adapter's tensors only"
    subject.take_back_from(trainer)
    subject.check_only_the_adapter_moved()
    subject.check_saved_and_reloaded(tmp_path / "adapter")


def test_gradient_checkpointing_changes_no_loss(tmp_path: Path) -> None:
    runs = []
    for checkpointing in (False, True):
        model = Subject().model
        options = {"gradient_checkpointing": checkpointing, "save_strategy": "no"}
        trainer = trainer_of(model, tmp_path, **options)
        trainer.train()
        runs.append(losses_of(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-6)


def test_its_files_hold_base_and_adapter(subject: Subject, tmp_path: Path) -> None:
    """`save_model` writes the base under its own names, and the side paths beside it."""
    trainer = trainer_of(subject.model, tmp_path / "out")
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    for folder in (tmp_path / "model", tmp_path / "out" / "checkpoint-8"):
        stored = load_file(folder / "model.safetensors")
        assert stored.keys() == subject.base.keys() | subject.trained().keys()
        assert all(torch.equal(stored[name], kept) for name, kept in subject.base.items())
        for name, parameter in subject.trained().items():
            assert torch.equal(stored[name], parameter)
    # transformers finds a whole base there; the side paths it reports and leaves out.
    loaded, info = LlamaForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert set(info["unexpected_keys"]) == subject.trained().keys()
    assert torch.equal(subject.logits(loaded), subject.logits(llama()))
    # After removal `save_pretrained` writes the base alone.
    sidepath.remove(subject.model, "a")
    subject.model.save_pretrained(tmp_path / "base")
    assert load_file(tmp_path / "base" / "model.safetensors").keys() == subject.base.keys()


def test_its_own_resume_continues_the_run(subject: Subject, tmp_path: Path) -> None:
    trainer_of(subject.model, tmp_path / "out").train()
    fresh = Subject()
    trainer_of(fresh.model, tmp_path / "out").train(
        resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4")
    )
    whole, resumed = subject.trained(), fresh.trained()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_evaluation_and_other_adapters(tmp_path: Path) -> None:
    subject = Subject(targets=("q_proj", "v_proj"))
    still = sidepath.inject(subject.model, subject.config, "still")
    for parameter in still.parameters():
        parameter.requires_grad_(False)
    kept = [parameter.clone() for parameter in still.parameters()]
    sidepath.activate(subject.model, "a")
    trainer = trainer_of(subject.model, tmp_path, save_strategy="no")
    first = trainer.evaluate(rows())["eval_loss"]
    trainer.train()
    assert trainer.evaluate(rows())["eval_loss"] < first
    assert all(torch.equal(a, b) for a, b in zip(kept, still.parameters(), strict=True))


def test_a_base_that_transformers_quantised(tmp_path: Path) -> None:
    """Trainer refuses "purely quantised" models and knows only PEFT's adapters: it is told so."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    llama().save_pretrained(tmp_path / "base")
    kept = ["lm_head"]
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=kept
    )
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=settings, device_map="cpu"
    )
    packed = {n: p.clone() for n, p in model.named_parameters() if p.dtype == torch.uint8}
    assert packed
    config = sidepath.LoRA(r=4, alpha=8.0, targets=("q_proj", "v_proj"))
    adapter = sidepath.inject(model, config, "a")
    assert not model.is_quantized
    trainer = trainer_of(model, tmp_path / "out", save_strategy="no")
    trainer.train()
    losses = losses_of(trainer)
    assert losses[-1] < losses[0]
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], kept) for name, kept in packed.items())
    adapter.save(tmp_path / "adapter")
    sidepath.remove(model, "a")
    assert model.is_quantized
    with pytest.raises(ValueError, match="purely quantized"):
        trainer_of(model, tmp_path / "out", save_strategy="no")
