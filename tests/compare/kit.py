"""A comparison on tiny random bases: picklable, so that worker processes get it too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sidepath.compare.contest import Contest
from sidepath.compare.entrants import Entrant, entrants_of
from sidepath.compare.runs import RunTable
from sidepath.compare.setting import Setting, Trial
from sidepath.compare.workers import Workers
from sidepath.config import TrainConfig
from tests.tokens import byte_tokenizer


@dataclass(frozen=True)
class TinyBases:
    """A random Llama of one token a byte; `name` stands for its weights."""

    name: str = "tiny"

    def tokenizer(self) -> Any:
        return byte_tokenizer()

    def causal(self) -> Any:
        return _llama()

    def classifier(self, labels: Sequence[str], pad_id: int) -> tuple[nn.Module, tuple[str, ...]]:
        from transformers import LlamaForSequenceClassification

        config = _llama().config
        config.num_labels, config.pad_token_id = len(labels), pad_id
        return LlamaForSequenceClassification(config).eval(), ("score",)

    def context(self) -> int | None:
        return 160

    def identity(self) -> str:
        return self.name


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        config = LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=258,
            max_position_embeddings=160,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
        return LlamaForCausalLM(config).eval()


def setting(**changes: Any) -> Setting:
    """The demo's reviews, 40 of them, two steps a trial, judged by their loss."""
    options: dict[str, Any] = {
        "bases": TinyBases(),
        "data": "demo:sentiment",
        "eval_data": None,
        "train": TrainConfig(steps=2, batch_size=4),
        "seeds": (0, 1, 2),
        "metric": "loss",
        "limit": 40,
        "eval_limit": 6,
        "max_new_tokens": 2,
    }
    return Setting(**{**options, **changes})


def entrants(*tables: dict[str, Any], rates: Sequence[float] = (1e-3, 1e-2)) -> list[Entrant]:
    found, faults = entrants_of(tables or ({"name": "lora", "r": 2}, {"name": "probe"}), rates)
    assert not faults
    return found


@dataclass
class Counted:
    """Stands for training: says what it was asked for, and answers by the rate and the seed."""

    asked: list[Trial] = field(default_factory=list)
    best: float = 1e-2
    """The learning rate with the lowest loss."""
    fails_after: int | None = None
    failing: Callable[[Trial], bool] = lambda trial: False

    def __call__(self, setting: Setting, trial: Trial) -> dict[str, Any]:
        if self.fails_after is not None and len(self.asked) >= self.fails_after:
            raise KeyboardInterrupt
        self.asked.append(trial)
        if self.failing(trial):
            return {"failed": "it burst"}
        value = abs(trial.learning_rate - self.best) + trial.seed
        costs = {"seconds": 1.0, "peak_memory_bytes": 10, "steps": 2}
        return {"value": value, "loss": value, **costs}


@contextmanager
def silent(what: str) -> Iterator[Callable[..., None]]:
    yield lambda *_: None


def contest(table: RunTable, run: Any, *others: Entrant, **changes: Any) -> Contest:
    """A contest of `others`, or of the two of `entrants()`."""
    said: list[str] = []
    workers = Workers(1, "processes", run)
    given = list(others) or entrants()
    return Contest(setting(**changes), given, table, workers, silent, said.append)


def table_in(folder: Path) -> RunTable:
    return RunTable(folder / "out")
