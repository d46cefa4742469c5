"""The files of `examples/` run as they stand."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python examples/NAME FOLDER`, in this process: the libraries are loaded already."""
    monkeypatch.setattr(sys, "argv", [name, str(folder)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("trainer.py", tmp_path, monkeypatch)
    said = capsys.readouterr().out
    assert "equal logits: True" in said
    assert (tmp_path / "sounds" / "sidepath.json").is_file()
    for line in ("The cow says moo.", "The dog says woof.", "The duck says quack."):
        assert line in said


def test_every_example_has_its_test() -> None:
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == ["trainer.py"]
