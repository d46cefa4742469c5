"""Saved adapters as they are combined: checked, read without their base, taken apart (floor 6)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from sidepath.analyse import Factors
from sidepath.analyse.factors import updates_in
from sidepath.errors import ConfigError, DamagedAdapter, SidepathError, StoreError, in_one_line
from sidepath.methods.base import Site
from sidepath.methods.lora import LoRA
from sidepath.store import manifest as manifests
from sidepath.store.contents import refuse_other_folders
from sidepath.store.folder import readable, sha256_file
from sidepath.store.hub import name_of
from sidepath.store.loading import load_tensors
from sidepath.store.manifest import Manifest, check_tensors, read_manifest
from sidepath.store.peft_config import PeftSettings
from sidepath.store.peft_format import (
    BASE_BIAS,
    ENDINGS,
    LEFT_BY_PEFT,
    MAGNITUDE,
    PREFIX,
    TOKENS,
    WEIGHTS,
)
from sidepath.store.peft_reading import other_ranks, settings_at
from sidepath.store.tensors import file_inside, read_header

Place = tuple[str, str]
"""A module's path, and the name of a tensor in it."""


@dataclass(frozen=True)
class Ingredient:
    """One adapter: its updates, and what it holds beside them, in full."""

    folder: Path
    digest: str
    """SHA-256 of the weights' file."""
    settings: Mapping[str, Any]
    """What its `adapter_config.json` says."""
    manifest: Manifest | None
    """None for a folder of PEFT's."""
    method: LoRA | PeftSettings
    sites: Mapping[str, Site]
    tensors: Mapping[str, Tensor]
    """The file's, by key."""
    others: Mapping[Place, Tensor]
    """Biases and the tensors of modules trained whole."""
    copies: Mapping[str, Tensor]
    """Repeated parameters of the base, by key: PEFT saves adapted embeddings so."""

    @property
    def name(self) -> str:
        """The folder's own name, or its repository's."""
        return name_of(self.folder)

    @property
    def whole(self) -> list[str]:
        """Paths of the modules trained whole."""
        return [path for path, site in self.sites.items() if site.kind == "whole"]

    @property
    def dora(self) -> bool:
        """Whether it holds magnitudes beside its factors."""
        return any(key.endswith(MAGNITUDE) for key in self.tensors)

    @property
    def token_rows(self) -> bool:
        """Whether it holds rows of tokens."""
        return any(key.endswith(TOKENS) for key in self.tensors)

    @cached_property
    def factors(self) -> dict[str, Factors]:
        """The updates by module path. Errors: see `updates_in`."""
        return updates_in(self.tensors, self.method.scaling_of, self.folder / WEIGHTS)


def read_all(folders: Iterable[Path]) -> list[Ingredient]:
    """Every adapter, read and checked; what is wrong with any of them is said at once.

    Errors: that of the one adapter that has some, else a `StoreError` with the faults of all;
    `ConfigError` where there are none to read.
    """
    found, errors = [], {}
    for folder in folders:
        try:
            with readable(folder):
                one = read(folder)
            assert one.factors
            found.append(one)
        except SidepathError as error:
            errors[folder] = error
    if not found and not errors:
        raise ConfigError("no adapter to combine")
    if len(errors) == 1:
        raise next(iter(errors.values()))
    if errors:
        faults = [f"{folder}: {in_one_line(error)}" for folder, error in errors.items()]
        raise StoreError(f"{len(errors)} adapters cannot be read", faults=faults)
    return found


def read(folder: Path) -> Ingredient:
    """One adapter's folder, ours or PEFT's. Digests, settings, keys and values are checked.

    Errors: `StoreError` where there is no adapter of low rank, `DamagedAdapter` with all faults.
    """
    refuse_other_folders(folder)
    path = file_inside(folder, WEIGHTS)
    manifest: Manifest | None = None
    faults: list[str] = []
    if manifests.is_ours(folder):
        manifest, faults = read_manifest(folder)
    if manifest is not None and not isinstance(manifest.config, LoRA):
        raise StoreError(
            f"{manifest.config.method} has no low-rank updates to combine", where=folder
        )
    header = read_header(path)
    settings, theirs, more = settings_at(folder)
    faults += more
    if manifest is not None:
        faults += check_tensors(manifest, header)
    elif not faults:
        faults = other_ranks(theirs, header)
    if faults:
        raise DamagedAdapter("the adapter cannot be trusted", where=folder, faults=faults)
    tensors = load_tensors(path, header)
    method: LoRA | PeftSettings = theirs
    if manifest is None:
        sites = {site.path: site for site in _peft_sites(tensors, theirs)}
    else:
        assert isinstance(manifest.config, LoRA)
        method, sites = manifest.config, {site.path: site for site in manifest.sites}
    others, copies = _others(tensors, sites)
    digest = manifest.files[WEIGHTS][1] if manifest else sha256_file(path)
    return Ingredient(folder, digest, settings, manifest, method, sites, tensors, others, copies)


def _peft_sites(tensors: Mapping[str, Tensor], settings: PeftSettings) -> Iterable[Site]:
    """Where a file of PEFT's puts its tensors, read off their names alone."""
    found: dict[str, Site] = {}
    for key in tensors:
        name = key.removeprefix(PREFIX)
        ending = next((ending for ending in ENDINGS if name.endswith(ending)), None)
        root = _root(name, settings.modules_to_save)
        if root is not None:
            found[root] = Site(root, "whole", pattern=root)
        elif ending is not None:
            path = name.removesuffix(ending)
            found[path] = Site(path, "dense", pattern=path)
        elif settings.bias == "all" and name.endswith(".bias"):
            path = name.removesuffix(".bias")
            found.setdefault(path, Site(path, "bias", pattern=path))
    return found.values()


def _root(name: str, whole: Iterable[str]) -> str | None:
    """The module trained whole that a tensor belongs to: the first whose path ends so."""
    parts = name.split(".")
    paths = (".".join(parts[:count]) for count in range(1, len(parts)))
    return next((path for path in paths if any(_is_tail(tail, path) for tail in whole)), None)


def _is_tail(tail: str, path: str) -> bool:
    return path == tail or path.endswith(f".{tail}")


def _others(
    tensors: Mapping[str, Tensor], sites: Mapping[str, Site]
) -> tuple[dict[Place, Tensor], dict[str, Tensor]]:
    """What a file holds beside factors and magnitudes: by place; and copies of the base's."""
    whole = [path for path, site in sites.items() if site.kind == "whole"]
    others: dict[Place, Tensor] = {}
    copies: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        root = next((path for path in whole if name.startswith(f"{path}.")), None)
        owner, _, local = name.rpartition(".")
        if root is not None:
            local = name.removeprefix(f"{root}.")
            if not local.startswith(LEFT_BY_PEFT):
                others[root, local] = tensor
        elif name.endswith((*ENDINGS[:4], MAGNITUDE)):
            continue
        elif name.endswith(BASE_BIAS):
            others[name.removesuffix(BASE_BIAS), "bias"] = tensor
        elif local == "bias" and owner in sites:
            others[owner, "bias"] = tensor
        else:
            copies[key] = tensor
    return others, copies


Weights = Callable[[str], tuple[float, ...]]
"""From a module's path to the weight of each adapter there."""
