"""The tensors of a transformers folder, read from its safetensors files one at a time (floor 4)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from torch import Tensor

from sidepath.store.fingerprint import checkpoint_files, renamed
from sidepath.store.loading import load_tensors
from sidepath.store.tensors import FLOATING, TensorInfo, read_header


def stored_name(name: str, stored: Collection[str]) -> str | None:
    """Under which of some names a parameter is stored; None where it is not.

    A base that was saved without its head lacks a prefix (`model.`), or has one more.
    """
    for known in (name, name.partition(".")[2]):
        if known in stored:
            return known
    return next((other for other in stored if other.partition(".")[2] == name), None)


class Checkpoint:
    """What a folder stores, by name; nothing but headers is read until a tensor is asked for.

    Names are those that transformers gives them (see `renamed`).

    Errors, when it is made: `StoreError` for a folder without safetensors, `DamagedAdapter` for a
    file that cannot be trusted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stored: dict[str, tuple[Path, TensorInfo]] = {}
        for path in checkpoint_files(folder):
            header = read_header(path, floating_only=False)
            self._stored |= {renamed(name): (path, info) for name, info in header.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __contains__(self, stored: str) -> bool:
        return stored in self._stored

    def shape(self, stored: str) -> tuple[int, ...]:
        """The shape of a stored tensor."""
        return self._stored[stored][1].shape

    def floating(self, stored: str) -> bool:
        """Whether a stored tensor's numbers are floating point: others are indices, or packed."""
        return self._stored[stored][1].dtype in FLOATING

    def found(self, name: str) -> str | None:
        """The stored name of a parameter; None where it is not stored."""
        return stored_name(name, self._stored)

    def read(self, stored: str) -> Tensor:
        """A stored floating tensor, in its stored type; only its bytes are read.

        Errors: `DamagedAdapter` when a value is NaN or Inf.
        """
        path, info = self._stored[stored]
        return load_tensors(path, {stored: info})[stored]
