"""Adapters on their way to the model: what their folders say, and their tensors (floor 5)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sidepath.errors import RequestRefused, WrongBase
from sidepath.injection.registry import Installed
from sidepath.methods.base import Method, Site
from sidepath.store.adapter import opened, stand_up
from sidepath.store.fingerprint import Fingerprint, same_base
from sidepath.store.folder import sha256_file
from sidepath.store.library import Entry, read_entry
from sidepath.store.new_tokens import tokens_at
from sidepath.store.peft_format import WEIGHTS


@dataclass(frozen=True)
class Checked:
    """An adapter in host memory whose every byte was checked: ready to stand on its base."""

    config: Method
    sites: tuple[Site, ...]
    tensors: Mapping[str, Mapping[str, Tensor]]
    """By the path of the module and the name within its delta."""
    digest: str
    """SHA-256 of the weights' file."""
    record: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    """A classifier's classes, in the order of its outputs."""

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for own in self.tensors.values() for tensor in own.values())

    def stand_up(self, model: nn.Module, name: str) -> Installed:
        """Put it on the model; its tensors are shared where dtype and device allow."""
        found = stand_up(model, self.config, name, self.sites, self.tensors, False).installed
        found.record = dict(self.record)
        return found


def read(model: nn.Module, folder: Path, allow_other_base: bool) -> Checked:
    """Read a folder and check it against the model, which is looked at and not changed.

    Errors: those of `sidepath.load`, and `RequestRefused` for a method that puts positions before
    each row and for an adapter that brings tokens.
    """
    with opened(model, folder, allow_other_base=allow_other_base) as ready:
        contents = ready.contents
        refuse_positions(contents.config, folder.name)
        _refuse_tokens(list(contents.tokens), folder.name)
        tensors = contents.placed(ready.loaded.tensors)
        ready.loaded.settle()
    manifest = contents.manifest
    return Checked(
        contents.config,
        tuple(contents.sites),
        tensors,
        sha256_file(contents.path) if manifest is None else manifest.files[WEIGHTS][1],
        {} if manifest is None else manifest.record,
        None if manifest is None or manifest.labels is None else tuple(manifest.labels),
    )


def described(folder: str | os.PathLike[str], base: Fingerprint | None) -> Entry:
    """What an adapter's folder says, its weights left on disk. `base`: must be the one it was
    made for, if it says so.

    Errors: `DamagedAdapter` with all faults, `StoreError`, `WrongBase`; `RequestRefused` as `read`.
    """
    entry = read_entry(Path(folder))
    if entry.config is not None:
        refuse_positions(entry.config, entry.name)
    _refuse_tokens(list(tokens_at(Path(folder))), entry.name)
    faults = [] if base is None or entry.samples is None else same_base(entry.samples, base)
    if faults and base is not None:
        raise WrongBase(
            "the adapter was made for another base",
            where=folder,
            found=f"a model with fingerprint {base.id}",
            expected=f"{entry.base or 'a base'} with fingerprint {entry.fingerprint}",
            faults=faults,
            hint="serve its own base; --allow-other-base serves it all the same",
        )
    return entry


def refuse_positions(config: Method, name: str) -> None:
    """Raise `RequestRefused` for a method that puts positions before each row."""
    if config.positions:
        raise RequestRefused(
            f'"{name}" cannot be served',
            found=f"{type(config).__name__}: it puts {config.positions} positions before each row",
            expected="a method that works beside the layers",
        )


def _refuse_tokens(tokens: list[str], name: str) -> None:
    if tokens:
        raise RequestRefused(
            f'"{name}" cannot be served beside its base: it brings tokens, and all adapters share '
            "one tokenizer",
            found=", ".join(tokens[:5]),
            hint="merge it, and serve the merged model: sidepath merge BASE ADAPTER OUT",
        )
