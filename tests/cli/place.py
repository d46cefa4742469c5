"""Where a wrong command is tried: the folders it may use, and commands that work but for a flaw."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """What a case may use: its own folder, and the session's base, data and adapter."""

    here: Path
    base: Path
    other: Path
    pairs: Path
    labelled: Path
    adapter: Path

    def train(self, *flags: object, data: Path | None = None) -> list[str]:
        """A training command that works but for `flags`."""
        words = ["train", "--base", self.base, "--data", data or self.pairs, "--steps", 1]
        return [str(word) for word in (*words, "--output", self.here / "out", *flags)]

    def file(self, name: str, text: str) -> Path:
        path = self.here / name
        path.write_text(text)
        return path

    def copy(self, folder: Path, name: str) -> Path:
        return Path(shutil.copytree(folder, self.here / name))


def generate(place: Place) -> list[str]:
    words = ["generate", "--base", place.base, "--adapter", place.adapter, "--prompt", "a"]
    return [str(word) for word in words]


def merge_command(place: Place, *words: object) -> list[str]:
    return [str(word) for word in ("merge", *words)]


Case = tuple[Callable[[Place], list[str]], tuple[str, ...]]
"""Makes a wrong command; and what its one message has to say."""
