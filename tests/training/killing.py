"""Runs that are killed and resumed, held against the unbroken run.

A tiny Llama, LoRA with dropout, three forward passes a step, a checkpoint after each of 20 steps.
Each piece of a run is a forked child: nothing but the checkpoints outlives a kill, and torch is
imported once. Children write the loss of each step (`float.hex`) and at the end the SHA-256 of
the final weights and of the watched history to a log; `finish` holds all of it against the
unbroken run's.

`SETTINGS` also packs rows, and has data that draw random numbers in a DataLoader worker process.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sidepath.config import TrainConfig
from sidepath.data.dataset import Data, load_data
from sidepath.training.checkpoint import path_of
from sidepath.training.loop import Training, train
from tests.faults import forked
from tests.tokens import byte_tokenizer, pairs_of_many_lengths
from tests.training.kit import llama, with_lora

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
    "watch": 3,
}


@dataclass(frozen=True)
class Setting:
    """One way to run: what differs from `TRAIN`, and from `load_data`'s and LoRA's defaults."""

    train: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)


def drawn(fields: dict[str, Any]) -> dict[str, Any]:
    """A row whose completion is drawn from all three global generators, anew each time."""
    letters = (random.choice("xyz"), "xyz"[np.random.randint(3)], "xyz"[int(torch.randint(3, ()))])
    return {**fields, "completion": "".join(letters) * (1 + int(torch.randint(4, ())))}


_LORA = {"dropout": 0.2, "r": 3}
SETTINGS = {
    "dropout 0.2, accumulation 3": Setting(lora=_LORA),
    "packing, dropout 0.2, accumulation 3": Setting(
        train={"packing": True}, data={"max_tokens": 48}, lora=_LORA
    ),
    "data that draw, 1 worker, dropout 0.2, accumulation 3": Setting(
        train={"workers": 1}, data={"transform": drawn}, lora=_LORA
    ),
}
"""The rows of the kill table; a new way to run is one entry here."""
PLAIN, PACKED, DRAWN = SETTINGS


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
    begun: Callable[[Training], None] = lambda reports: None,
    log: str = "log",
    every: int = 1,
) -> None:
    """One start of a run, with `resume`, up to its end, or until it was asked to stop.

    `begun` is called before the first step, `at_step` after each one. `every`: steps from one
    checkpoint to the next.
    """
    torch.set_num_threads(1)  # a child is too short-lived for a pool of threads
    says, chosen = Log(folder / log), SETTINGS[setting]
    model = with_lora(llama(seed=0), **chosen.lora)
    config = TrainConfig(**{**TRAIN, **chosen.train, "checkpoint_every": every})
    torch.manual_seed(random.SystemRandom().randrange(2**32))  # must not matter
    checkpoints = folder / "checkpoints"
    reports = train(model, data_of(setting), config, checkpoints=checkpoints, resume=True)
    begun(reports)
    for report in reports:
        for notice in report.notices:
            says.say(notice=notice)
        says.say(loss=[report.number, report.loss.hex(), report.gradient_norm.hex()])
        if reports.interrupted:
            assert report.checkpoint is not None
            says.say(stopped=report.checkpoint.name)
        at_step(report.number)
    if not reports.interrupted:
        assert reports.history is not None
        watched = hashlib.sha256(reports.history.as_json().encode()).hexdigest()
        says.say(weights=f"{weights_of(model)}, history {watched}")


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


def read(folder: Path, log: str = "log") -> Outcome:
    """A finished run's log. A step logged twice has to agree with itself."""
    said = Log(folder / log)
    losses: dict[int, tuple[str, str]] = {}
    for number, *values in said.facts("loss"):
        assert losses.setdefault(number, tuple(values)) == tuple(values), f"step {number} differs"
    (weights,) = set(said.facts("weights"))
    return Outcome(losses, weights)


def finish(row: Row, folder: Path, *, every: int = 1) -> None:
    """Let a run come to its end and compare it with the unbroken one."""
    code = forked(lambda: play(row.setting, folder, every=every))
    if code != 0:
        row.exceptions.append(f"a resumed run ended with code {code}")
        return
    count(row, folder, [read(folder)], unbroken(row.setting), every=every)


def count(
    row: Row, folder: Path, outcomes: Sequence[Outcome], expected: Outcome, *, every: int = 1
) -> None:
    """Count a run that came to its end, in each of its processes, and whether it is equal.

    A kill between a step's checkpoint and its log line loses the line, not the step: the losses
    that were logged have to agree, and the weights after all of them.
    """
    count_notices(row, folder)
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    names = [path_of(folder, number).name for number in range(1, STEPS + 1)]
    # The one before the last is where the run was stopped, when not every step is saved.
    others = names[-2:-1] if every == 1 else names[:-1]
    if left not in [[other, names[-1]] for other in others]:
        row.exceptions.append(f"left in the folder: {left}")
    row.runs += 1
    row.equal += all(
        outcome.weights == expected.weights and outcome.losses.items() <= expected.losses.items()
        for outcome in outcomes
    )


def count_notices(row: Row, folder: Path) -> None:
    """Resumes and fallbacks as the runs themselves said them (the first process's word)."""
    notices = Log(folder / "log").facts("notice")
    row.resumes += sum(notice.startswith("resumed after step") for notice in notices)
    row.fallbacks += sum("an older one is used" in notice for notice in notices)
