"""Folders that are damaged on purpose: a file's bytes, or what kind of thing stands in its place.

All chance comes from the generator that is handed in: a case can be made again from its seed.
"""

from __future__ import annotations

import os
import random
import struct
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.gguf import GGUF
from tests.fuzz.headers import SAFETENSORS
from tests.fuzz.mutators import BYTES, JSON, LINES, Mutator, flip


@dataclass(frozen=True)
class Link:
    """A symbolic link in the place of a file."""

    to: str


@dataclass(frozen=True)
class Sparse:
    """A file of an absurd size, with no blocks on the disk."""

    head: bytes
    size: int


_LEFT_NOTHING = (
    *(ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError),
    *(AssertionError, struct.error),
)
FIFO, FOLDER = "a fifo", "a folder"
Content = bytes | Link | Sparse | str


@dataclass
class Draft:
    """What will lie in a folder, and what was done to it."""

    files: dict[str, Content]
    done: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif isinstance(content, Link):
                path.symlink_to(content.to)
            elif isinstance(content, Sparse):
                path.write_bytes(content.head)
                os.truncate(path, content.size)
            elif content == FIFO:
                os.mkfifo(path)
            else:
                path.mkdir()


def mutators_of(name: str) -> tuple[Mutator, ...]:
    """What can be done to the bytes of a file of this name."""
    if name.endswith(".safetensors"):
        return (*BYTES, *SAFETENSORS, *SAFETENSORS)
    if name.endswith(".json"):
        return (*BYTES, *JSON, *JSON)
    if name.endswith(".gguf"):
        return (*BYTES, *GGUF, *GGUF)
    if name.endswith((".toml", ".jsonl", ".csv", ".tsv", ".txt")):
        return (*BYTES, *LINES, *LINES)
    return BYTES


def mutate(
    rng: random.Random, draft: Draft, names: tuple[str, ...], *, places: bool, sparse: bool
) -> None:
    """Change one of the files `names` in place; with `places` also what kind of thing it is."""
    present = [name for name in names if isinstance(draft.files.get(name), bytes)]
    if not present:
        return
    name = rng.choice(present)
    data = draft.files[name]
    assert isinstance(data, bytes)
    if places and rng.random() < 0.08:
        _replace(rng, draft, name)
    elif sparse and rng.random() < 0.01:
        draft.files[name] = Sparse(
            data[: rng.choice((0, 8, len(data)))], rng.choice((2**30, 2**40))
        )
        draft.done.append(f"{name}: sparse")
    elif data:
        mutator = rng.choice(mutators_of(name))
        try:
            draft.files[name] = mutator(rng, data)
        except _LEFT_NOTHING:
            draft.files[name] = flip(rng, data)  # an earlier mutation left nothing to understand
        draft.done.append(f"{name}: {mutator.__name__}")


def _replace(rng: random.Random, draft: Draft, name: str) -> None:
    what: Content | None = rng.choice(
        (
            None,
            FIFO,
            FOLDER,
            Link("../outside/secret"),
            Link("/dev/zero"),
            Link(name),
            Link("nowhere"),
            Link("../../outside/secret"),
        )
    )
    if what is None:
        del draft.files[name]
    else:
        draft.files[name] = what
    draft.done.append(f"{name}: {what!r}")
