"""Runs that are killed and resumed, held against the unbroken run.

A tiny Llama, LoRA with dropout, three forward passes a step, a checkpoint after each of 20 steps.
Each piece of a run is a forked child: nothing but the checkpoints outlives a kill, and torch is
imported once. Children write the loss of each step (`float.hex`) and at the end the SHA-256 of
the final weights to a log; `finish` holds all of it against the unbroken run's.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sidepath.config import TrainConfig
from sidepath.training.data import Data, load_data
from sidepath.training.loop import train
from tests.faults import forked
from tests.training.kit import llama, with_lora
from tests.training.tokens import byte_tokenizer, pairs_of_many_lengths

STEPS = 20
_open, _write, _close = os.open, os.write, os.close
"""The log's own, which no test lets fail."""
PHASES = ("start-up", "step", "save")
TRAIN: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": 2,
    "accumulate": 3,
    "learning_rate": 2e-2,
    "checkpoint_every": 1,
    "keep_checkpoints": 2,
    "eval_every": 4,
    "eval_share": 0.2,
}


@dataclass(frozen=True)
class Setting:
    """One way to run: what differs from `TRAIN`, and from `load_data`'s and LoRA's defaults."""

    train: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)


SETTINGS = {"dropout 0.2, accumulation 3": Setting(lora={"dropout": 0.2, "r": 3})}
"""The rows of the kill table; a new way to run is one entry here."""
PLAIN = next(iter(SETTINGS))


@dataclass
class Row:
    """One row of the kill table."""

    kind: str
    setting: str
    kills: int = 0
    """Kills, or failures, that were carried out."""
    resumes: int = 0
    """Starts that took up a checkpoint."""
    fallbacks: int = 0
    """Starts that had to take an older checkpoint than the newest."""
    runs: int = 0
    """Runs that came to their end."""
    equal: int = 0
    """Of these, with the unbroken run's loss bytes and weight hashes."""
    exceptions: list[str] = field(default_factory=list)
    """Whatever else happened; must stay empty."""
    places: dict[str, int] = field(default_factory=dict)
    """Where kills struck."""


@cache
def data_of(setting: str) -> Data:
    """The rows, tokenised once."""
    return load_data(pairs_of_many_lengths(), byte_tokenizer(), **SETTINGS[setting].data)


class Log:
    """What the children of one run say; a line is one write, so a kill leaves no half of one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def say(self, **fact: Any) -> None:
        """Append one fact."""
        handle = _open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        _write(handle, json.dumps(fact).encode() + b"\n")
        _close(handle)

    def facts(self, name: str) -> list[Any]:
        """All facts of a name, in order."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [fact[name] for fact in map(json.loads, lines) if name in fact]


def play(
    setting: str,
    folder: Path,
    *,
    at_step: Callable[[int], None] = lambda number: None,
    mark: Callable[[int], None] = lambda phase: None,
) -> None:
    """One start of a run, with `resume`, up to its end; `at_step` is called after each step."""
    torch.set_num_threads(1)  # a child is too short-lived for a pool of threads
    log, chosen = Log(folder / "log"), SETTINGS[setting]
    model = with_lora(llama(seed=0), **chosen.lora)
    config = TrainConfig(**{**TRAIN, **chosen.train})
    torch.manual_seed(random.SystemRandom().randrange(2**32))  # must not matter
    reports = train(
        model, data_of(setting), config, checkpoints=folder / "checkpoints", resume=True
    )
    mark(1)
    for report in reports:
        for notice in report.notices:
            log.say(notice=notice)
        log.say(loss=[report.number, report.loss.hex(), report.gradient_norm.hex()])
        at_step(report.number)
    log.say(weights=weights_of(model))


def weights_of(model: torch.nn.Module) -> str:
    """The SHA-256 over all names and bytes of a model's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def run_folder() -> Iterator[Path]:
    """A folder for one run."""
    folder = Path(tempfile.mkdtemp(prefix="sidepath-kill-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Outcome:
    """The end of a run."""

    losses: dict[int, tuple[str, str]]
    weights: str


@cache
def unbroken(setting: str) -> Outcome:
    """The run that nothing stops, with every step's loss."""
    with run_folder() as folder:
        assert forked(lambda: play(setting, folder)) == 0
        outcome = read(folder)
    assert sorted(outcome.losses) == list(range(1, STEPS + 1))
    return outcome


def read(folder: Path) -> Outcome:
    """A finished run's log. A step logged twice has to agree with itself."""
    log = Log(folder / "log")
    losses: dict[int, tuple[str, str]] = {}
    for number, *values in log.facts("loss"):
        assert losses.setdefault(number, tuple(values)) == tuple(values), f"step {number} differs"
    (weights,) = set(log.facts("weights"))
    return Outcome(losses, weights)


def finish(row: Row, folder: Path) -> None:
    """Let a run come to its end and compare it with the unbroken one.

    A kill between a step's checkpoint and its log line loses the line, not the step: the losses
    that were logged have to agree, and the weights after all of them.
    """
    code = forked(lambda: play(row.setting, folder))
    if code != 0:
        row.exceptions.append(f"a resumed run ended with code {code}")
        return
    count_notices(row, folder)
    outcome, expected = read(folder), unbroken(row.setting)
    agree = all(expected.losses[number] == value for number, value in outcome.losses.items())
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    if left != [f"step-{number:08d}" for number in (STEPS - 1, STEPS)]:
        row.exceptions.append(f"left in the folder: {left}")
    row.runs += 1
    row.equal += agree and outcome.weights == expected.weights


def count_notices(row: Row, folder: Path) -> None:
    """Resumes and fallbacks as the runs themselves said them."""
    notices = Log(folder / "log").facts("notice")
    row.resumes += sum(notice.startswith("resumed after step") for notice in notices)
    row.fallbacks += sum("an older one is used" in notice for notice in notices)
