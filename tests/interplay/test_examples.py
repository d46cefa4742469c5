"""The files of `examples/` run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example(name: str, tmp_path: Path) -> None:
    paths = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert "equal logits: True" in done.stdout
    assert (tmp_path / "sounds" / "sidepath.json").is_file()
    for line in ("The cow says moo.", "The dog says woof.", "The duck says quack."):
        assert line in done.stdout


def test_there_are_examples() -> None:
    assert list(EXAMPLES.glob("*.py"))
