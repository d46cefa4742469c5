"""What all trials of a comparison share, and the one trial; neither holds anything heavy."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import nn

from sidepath import __version__
from sidepath.compare.entrants import Entrant
from sidepath.config import TrainConfig, as_dict

Phase = Literal["sweep", "final"]
ROOMS = ("config.py", "kernels", "core", "methods", "injection", "store", "data", "training")
"""Code that a trial's figures depend on: `store` puts the adapter in, and counts bytes."""


class Bases(Protocol):
    """Where fresh bases come from. Picklable and hashable: worker processes get a copy."""

    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        ...

    def causal(self) -> nn.Module:
        """The base as a causal language model, as it is on disk."""
        ...

    def classifier(self, labels: Sequence[str], pad_id: int) -> tuple[nn.Module, tuple[str, ...]]:
        """The base with a classification head, and the modules that no checkpoint filled."""
        ...

    def context(self) -> int | None:
        """Most tokens of a row, where the base has a limit."""
        ...

    def identity(self) -> str:
        """Names the base's weights, dtype and device."""
        ...


@dataclass(frozen=True)
class Setting:
    """The data, the measure and the budget, the same for every entrant."""

    bases: Bases
    data: str
    """A file, a data set of the hub, or `demo:TASK`."""
    eval_data: str | None
    """Test rows; a demo task has its own."""
    train: TrainConfig
    """The budget: everything but the learning rate and the seed, which are a trial's."""
    seeds: tuple[int, ...]
    metric: str | None = None
    """None: the data's own."""
    columns: tuple[tuple[str, str], ...] = ()
    limit: int | None = None
    eval_limit: int | None = None
    validation: float = 0.1
    """Share of the training rows that learning rates are judged on."""
    max_tokens: int = 1024
    max_new_tokens: int = 64


@dataclass(frozen=True)
class Trial:
    """One training run: an entrant, a learning rate and a seed."""

    entrant: Entrant
    learning_rate: float
    seed: int
    phase: Phase
    """`sweep`: trained on the rows left by validation and judged on validation; `final`: trained
    on all training rows and judged on the test rows."""

    @property
    def key(self) -> tuple[str, float, int]:
        """Names the trial among those of its phase."""
        return self.entrant.label, self.learning_rate, self.seed

    def train_config(self, setting: Setting) -> TrainConfig:
        """The training loop's settings of this trial."""
        return dataclasses.replace(setting.train, learning_rate=self.learning_rate, seed=self.seed)

    def describe(self, setting: Setting, data: dict[str, Any], base: str) -> dict[str, Any]:
        """Everything that determines the trial's figures, as plain values."""
        return {
            **self.entrant.identity(),
            "phase": self.phase,
            "train": as_dict(self.train_config(setting)),
            "data": data,
            "base": base,
            "max_new_tokens": setting.max_new_tokens,
            "code": code_version(),
        }


def digest_of(described: dict[str, Any]) -> str:
    """SHA-256 of plain values."""
    text = json.dumps(described, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def code_version() -> str:
    """Names the code: our version, that of torch, and a digest of the sources trials run."""
    import torch
    import transformers

    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256((root / "compare" / "trial.py").read_bytes())
    for room in ROOMS:
        files = [root / room] if room.endswith(".py") else sorted((root / room).glob("*.py"))
        for file in files:
            digest.update(f"{room}/{file.name}\0".encode() + file.read_bytes())
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    python = platform.python_version()
    return f"sidepath {__version__} {digest.hexdigest()[:16]}, {versions}, Python {python}"
