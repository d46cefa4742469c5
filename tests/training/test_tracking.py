"""Trackers: what is logged is read back from the event file, or seen by a stand-in for wandb."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidepath.errors import ConfigError, MissingExtra
from sidepath.training import tracking
from sidepath.training.tracking import trackers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

WANDB = '''
"""Says what is done to it in a file."""
import json, os

def say(*what):
    with open(os.environ["STAND_IN"], "a") as out:
        out.write(json.dumps(what) + "\\n")

class config:
    @staticmethod
    def update(values, allow_val_change):
        say("config", values)

class Run:
    def log(self, values, step=None):
        say("log", values, step)
    def finish(self):
        say("finish")

def init(**options):
    say("init", options)
    return Run()
'''


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A stand-in for the package, and the file in which it says what it was asked."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "wandb.py").write_text(WANDB)
    said = tmp_path / "said"
    monkeypatch.setenv("STAND_IN", str(said))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    importlib.invalidate_caches()
    yield said
    sys.modules.pop("wandb", None)


def heard(said: Path) -> list[list[object]]:
    return [json.loads(line) for line in said.read_text().splitlines()]


def test_tensorboard_is_read_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"train": {"steps": 3, "learning_rate": 1e-3}, "method": "lora"}
    with trackers(["tensorboard"], tmp_path, "run", settings) as tracking:
        for step in (1, 2, 3):
            held_out = 0.5 if step == 3 else None
            tracking.log({"loss": 1 / step, "held out/loss": held_out}, step)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    losses = {event.step: event.value for event in events.Scalars("loss")}
    assert losses == pytest.approx({1: 1.0, 2: 0.5, 3: 1 / 3})
    assert [(e.step, e.value) for e in events.Scalars("held out/loss")] == [(3, 0.5)]
    (said,) = events.Tensors("settings/text_summary")
    text = said.tensor_proto.string_val[0].decode()
    assert "| train.learning_rate | 0.001 |" in text
    assert "| method | lora |" in text


def test_wandb_gets_settings_figures_and_an_end(wandb: Path, tmp_path: Path) -> None:
    with trackers(["wandb"], tmp_path / "runs", "first", {"train": {"steps": 2}}) as tracking:
        tracking.log({"loss": 2.0, "held out": None}, 1)
        tracking.log({"loss": 1.0}, 2)
    assert heard(wandb) == [
        ["init", {"project": "sidepath", "name": "first", "dir": str(tmp_path / "runs")}],
        ["config", {"train": {"steps": 2}}],
        ["log", {"loss": 2.0}, 1],
        ["log", {"loss": 1.0}, 2],
        ["finish"],
    ]
    assert (tmp_path / "runs").is_dir()


def test_a_run_that_fails_is_closed_too(wandb: Path, tmp_path: Path) -> None:
    def failing() -> None:
        with trackers(["wandb"], tmp_path, "run"):
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert heard(wandb)[-1] == ["finish"]


def test_only_the_first_process_logs(
    wandb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_first_process", lambda: False)
    with trackers(["wandb", "tensorboard"], tmp_path / "runs", "run", {"a": 1}) as found:
        found.log({"loss": 1.0}, 1)
    assert not wandb.exists()
    assert not (tmp_path / "runs").exists()


def test_a_package_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_installed", lambda packages: False)
    with pytest.raises(MissingExtra) as error, trackers(["wandb", "tensorboard"], tmp_path, "r"):
        pass
    assert "pip install wandb" in str(error.value)
    assert "pip install 'sidepath[track]'" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(tracking._installed(["wandb"]), reason="wandb is installed here")
def test_wandb_is_not_installed_here(tmp_path: Path) -> None:
    with pytest.raises(MissingExtra, match="wandb"), trackers(["wandb"], tmp_path, "run"):
        pass


def test_an_unknown_tracker(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='did you mean "tensorboard"'):
        trackers(["tensorbord"], tmp_path, "run").__enter__()


def test_off_by_default_nothing_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from sidepath.training.tracking import trackers\n"
        f"with trackers([], {str(tmp_path)!r}, 'run') as t: t.log({{'loss': 1.0}}, 1)\n"
        "print([m for m in ('accelerate', 'tensorboard', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert list(tmp_path.iterdir()) == []
