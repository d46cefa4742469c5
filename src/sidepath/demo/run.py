"""The demo, straight through: plan, audit, train, compare, save, merge, route, report.

Three tasks are learned by three adapters over one embedded base, and each by full fine-tuning
of a copy of it, measured on rows that share no attribute combination with the training rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sidepath.base import embedded_base
from sidepath.config import TrainConfig
from sidepath.data.dataset import Data, load_data
from sidepath.demo.mixed import MixedBatch, mixed_batch
from sidepath.demo.report import write_report
from sidepath.demo.tasks import Task, make_tasks
from sidepath.injection.registry import base_parameters
from sidepath.injection.surgery import activate
from sidepath.merging.merge import merge_folder
from sidepath.methods.lora import LoRA
from sidepath.store.adapter import Adapter, inject
from sidepath.store.plan import Plan, plan
from sidepath.training.evaluate import evaluate, generate
from sidepath.training.loop import train

Advance = Callable[..., None]
Progress = Callable[[str], AbstractContextManager[Advance]]
Say = Callable[[str], None]

LORA = LoRA(r=5, alpha=10.0, targets=("all-linear",))
"""Rank 5 of every matrix of the blocks: under 4 % of the base's parameters."""
MAX_TOKENS = 256
SAMPLES = 3


@dataclass
class Outcome:
    """One task: the base, LoRA and full fine-tuning on the same test rows."""

    name: str
    description: str
    metric: str
    audit: dict[str, Any]
    base: float = 0.0
    lora: float = 0.0
    full: float = 0.0
    lora_trainable: int = 0
    full_trainable: int = 0
    lora_bytes: int = 0
    full_bytes: int = 0
    seconds: float = 0.0
    """Training the adapter."""
    full_seconds: float = 0.0
    """Training a copy of the base whole."""
    lora_losses: list[float] = field(default_factory=list)
    full_losses: list[float] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)


def run_demo(output: Path, *, seed: int, progress: Progress, say: Say) -> dict[str, Any]:
    """Run the whole demonstration; its adapters, merged folder and report go below `output`.

    Returns the JSON document of `sidepath demo`.
    """
    began = time.perf_counter()
    model, tokenizer = _load_base()
    planned = plan(model, LORA, batch_size=16, tokens=64)
    say(f"\nThe base: {planned.total:,} parameters, frozen. What each adapter would be:\n{planned}")
    outcomes, adapters = [], []
    for task in make_tasks(seed=seed):
        data = load_data(task.train, tokenizer, max_tokens=MAX_TOKENS)
        test = load_data(task.test, tokenizer, max_tokens=MAX_TOKENS)
        say(f"\n{task.name}: {task.description}\n{_audit_line(data)}")
        outcome = Outcome(task.name, task.description, task.metric, data.audit.as_dict())
        activate(model, None)
        outcome.base = _score(model, task, test)
        before = _samples(model, tokenizer, task)
        adapter = _adapt(model, task, data, test, outcome, seed, progress, output)
        adapters.append(adapter)
        after = _samples(model, tokenizer, task)
        outcome.samples = [
            {**row, "base": one, "lora": two}
            for row, one, two in zip(task.test, before, after, strict=False)
        ]
        _fine_tune(_load_base()[0], task, data, test, outcome, seed, progress)
        outcomes.append(outcome)
    say("\nMerging each adapter into a plain transformers folder, re-reading it, comparing")
    parity = {
        adapter.name: merge_folder(
            embedded_base(), [output / "adapters" / adapter.name], output / "merged" / adapter.name
        ).as_dict()["parity"]
        for adapter in adapters
    }
    mixed = mixed_batch(
        model, tokenizer, [(task.name, task.test) for task in make_tasks(seed=seed)]
    )
    seconds = time.perf_counter() - began
    return _published(output, planned, outcomes, parity, mixed, seconds)


def _load_base() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded_base()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def _audit_line(data: Data) -> str:
    audit = data.audit
    ends = 100 * (audit.end_token_share or 0.0)
    return (
        f"audit: {audit.rows} rows, {100 * audit.supervised_share:.1f} % of tokens supervised, "
        f"end token in {ends:.0f} % of rows, {audit.truncated} truncated, "
        f"{audit.duplicates} duplicates"
    )


def _score(model: nn.Module, task: Task, test: Data) -> float:
    """The task's metric from 0 to 100, from greedy generation."""
    metric = "bleu" if task.metric == "bleu" else "exact_match"
    found = evaluate(
        model, test, metrics=[metric], batch_size=64, max_new_tokens=task.max_new_tokens
    )
    return found[metric] if metric == "bleu" else 100 * found[metric]


def _samples(model: nn.Module, tokenizer: Any, task: Task) -> list[str]:
    prompts = [row["prompt"] for row in task.test[:SAMPLES]]
    return generate(model, tokenizer, prompts, max_new_tokens=task.max_new_tokens)


def _settings(task: Task, learning_rate: float, seed: int) -> TrainConfig:
    return TrainConfig(
        steps=task.steps, batch_size=task.batch_size, learning_rate=learning_rate, seed=seed
    )


def _train(
    model: nn.Module, data: Data, config: TrainConfig, what: str, progress: Progress
) -> tuple[list[float], float]:
    """Train with a progress bar; the losses, and the seconds the steps took."""
    losses, seconds = [], 0.0
    with progress(what) as advance:
        for step in train(model, data, config):
            losses.append(step.loss)
            seconds += step.seconds
            advance(step.number, step.total, f"loss {step.loss:.3f}")
    return losses, seconds


def _adapt(
    model: nn.Module,
    task: Task,
    data: Data,
    test: Data,
    outcome: Outcome,
    seed: int,
    progress: Progress,
    output: Path,
) -> Adapter:
    """Train, measure and save one adapter; the model keeps it, active."""
    torch.manual_seed(seed)
    adapter = inject(model, LORA, name=task.name)
    settings = _settings(task, task.lora_learning_rate, seed)
    outcome.lora_losses, outcome.seconds = _train(
        model, data, settings, f"{task.name}: LoRA", progress
    )
    outcome.lora = _score(model, task, test)
    outcome.lora_trainable = sum(parameter.numel() for parameter in adapter.parameters())
    folder = output / "adapters" / task.name
    adapter.save(folder, metrics={task.metric: outcome.lora})
    outcome.lora_bytes = (folder / "adapter_model.safetensors").stat().st_size
    return adapter


def _fine_tune(
    twin: nn.Module,
    task: Task,
    data: Data,
    test: Data,
    outcome: Outcome,
    seed: int,
    progress: Progress,
) -> None:
    """Train a copy of the base whole, and measure it the same way."""
    settings = _settings(task, task.full_learning_rate, seed)
    outcome.full_losses, outcome.full_seconds = _train(
        twin, data, settings, f"{task.name}: full fine-tuning", progress
    )
    outcome.full = _score(twin, task, test)
    trained = [parameter for _, parameter in base_parameters(twin)]
    outcome.full_trainable = sum(parameter.numel() for parameter in trained)
    outcome.full_bytes = sum(parameter.nbytes for parameter in trained)


def _published(
    output: Path,
    planned: Plan,
    outcomes: list[Outcome],
    parity: Mapping[str, Mapping[str, float]],
    mixed: MixedBatch,
    seconds: float,
) -> dict[str, Any]:
    """The result as one document, and the report written from it."""
    result: dict[str, Any] = {
        "tasks": [asdict(outcome) for outcome in outcomes],
        "parity": {**_worst(parity), "each": parity},
        "routed_equal": mixed.equal,
        "routed": asdict(mixed),
        "plan": planned.as_dict(),
        "seconds": seconds,
    }
    path = output / "demo-report.html"
    written = path.with_suffix(".part")
    write_report(written, result)
    written.replace(path)
    return {**result, "report": str(path)}


def _worst(parity: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The largest difference and the smallest agreement over all merges."""
    values = list(parity.values())
    worst = {name: max(one[name] for one in values) for name in ("max_abs", "mean_abs", "kl")}
    return {**worst, "top1": min(one["top1"] for one in values)}
