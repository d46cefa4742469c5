"""An adapter that was watched while it was trained, and the folder it was merged into."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sidepath.cli import main


@dataclass(frozen=True)
class Watched:
    """Folders of one run."""

    base: Path
    adapter: Path
    merged: Path


def watch(base: Path, data: Path, folder: Path, steps: int = 9) -> Watched:
    """Train with the command line, evaluating and watching as it goes, and merge."""
    adapter, merged = folder / "numbers", folder / "merged"
    flags = f"--base {base} --data {data} --output {adapter} --r 2 --steps {steps} --watch 2"
    more = "--batch-size 4 --learning-rate 0.05 --eval-share 0.25 --eval-every 4"
    assert main(["train", *flags.split(), *more.split()]) == 0
    assert main(["merge", str(base), str(adapter), str(merged)]) == 0
    return Watched(base, adapter, merged)
