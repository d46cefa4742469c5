"""A folder of adapters as a library: what is in it, of which base, how large, how good (floor 4).

Listing reads an adapter's manifest and the head of its weights, and of every other file the size
alone: no weight, whatever the adapters' size. Loading checks everything, as always.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from sidepath.errors import (
    DamagedAdapter,
    SidepathError,
    StoreError,
    UnknownAdapter,
    in_one_line,
    meant,
)
from sidepath.methods.base import Method
from sidepath.methods.lora import LoRA
from sidepath.store import manifest as manifests
from sidepath.store.adapter import Adapter, load
from sidepath.store.fingerprint import Fingerprint, fingerprint, same_base
from sidepath.store.folder import names_in, readable
from sidepath.store.manifest import check_tensors, read_manifest, sizes
from sidepath.store.peft_format import CONFIG, WEIGHTS
from sidepath.store.peft_reading import trusted_settings
from sidepath.store.tensors import TensorInfo, file_inside, read_header


@dataclass(frozen=True)
class Entry:
    """One adapter of a library, by what its folder says."""

    name: str
    """The name of its folder."""
    method: str
    rank: int | None
    """LoRA's rank (the commonest, where ranks differ); None for a method without one."""
    base: str | None
    """What the base was called."""
    base_revision: str | None
    """The base's commit, where it came from the hub."""
    fingerprint: str | None
    """The base's fingerprint; None for a folder of PEFT's, which has none."""
    digest: str | None
    """SHA-256 of the weights, as recorded when they were saved; None for a folder of PEFT's."""
    numbers: int
    """Numbers that the weights' file holds."""
    size: int
    """Size in bytes of the folder's files."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    samples: Fingerprint | None = field(default=None, repr=False, compare=False)
    config: Method | None = field(default=None, repr=False, compare=False)
    """The method's settings; None for a folder of PEFT's."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        left_out = ("samples", "config")
        values = {name: value for name, value in vars(self).items() if name not in left_out}
        return values | {"metrics": dict(self.metrics)}


@dataclass(frozen=True)
class Damaged:
    """A folder that holds an adapter which cannot be trusted, and why."""

    name: str
    fault: str

    def as_dict(self) -> dict[str, str]:
        """Plain values for JSON."""
        return asdict(self)


class Library(Mapping[str, Entry]):
    """The adapters in the subfolders of one folder, by name, as they were when it was made.

    `damaged` lists those that cannot be trusted, `others` names what is no adapter. A link is not
    followed: it is listed as damaged. Hidden folders, such as a save in progress, are left out.

    Errors: `StoreError` when `folder` is missing, or is an adapter's own.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.damaged: list[Damaged] = []
        self.others: list[str] = []
        self._entries: dict[str, Entry] = {}
        _require_library(self.folder)
        for found in sorted(os.scandir(self.folder), key=lambda found: found.name):
            if not found.name.startswith("."):
                self._take(found)

    def _take(self, found: os.DirEntry[str]) -> None:
        if found.is_symlink():
            self.damaged.append(Damaged(found.name, "a link: not followed"))
            return
        try:
            with readable(Path(found.path)):
                names = set(os.listdir(found.path)) if found.is_dir() else set()
            if names & {WEIGHTS, CONFIG, manifests.NAME}:
                self._entries[found.name] = read_entry(Path(found.path))
            else:
                self.others.append(found.name)
        except SidepathError as error:
            self.damaged.append(Damaged(found.name, in_one_line(error)))

    def __getitem__(self, name: str) -> Entry:
        """The adapter of this name. Errors: `UnknownAdapter`."""
        if name in self._entries:
            return self._entries[name]
        fault = next((one.fault for one in self.damaged if one.name == name), None)
        raise UnknownAdapter(
            f'the library has no adapter "{name}"' if fault is None else f'"{name}" is damaged',
            where=self.folder,
            found=fault,
            hint=meant(name, self._entries),
        )

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def search(
        self,
        base: nn.Module | Fingerprint | str | os.PathLike[str] | None = None,
        *,
        method: str | None = None,
    ) -> list[Entry]:
        """The adapters made for `base`, of `method`; all where neither is given.

        `base`: a model, a transformers folder, or a fingerprint, as such or as its id is printed
        (`sha256:...`; ids differ between dtypes of one base, the other forms do not mind).
        """
        fits = _fitting(base)
        return [
            entry
            for entry in self._entries.values()
            if fits(entry) and (method is None or entry.method == method)
        ]

    def load(
        self,
        model: nn.Module,
        name: str,
        *,
        as_name: str | None = None,
        allow_other_base: bool = False,
        trainable: bool = False,
    ) -> Adapter:
        """Load the adapter of this name onto its base, called `as_name` there: see `load`.

        Errors: `UnknownAdapter`, and those of `load`.
        """
        return load(
            model,
            self.folder / self[name].name,
            as_name or name,
            allow_other_base=allow_other_base,
            trainable=trainable,
        )


def _require_library(folder: Path) -> None:
    if not folder.is_dir():
        raise StoreError("there is no such folder of adapters", where=folder)
    if (folder / WEIGHTS).exists():
        raise StoreError(
            "the folder is an adapter's own",
            where=folder,
            found=names_in(folder),
            expected="a folder whose subfolders are adapters'",
            hint=f"its parent: {folder.absolute().parent}",
        )


def _fitting(
    base: nn.Module | Fingerprint | str | os.PathLike[str] | None,
) -> Callable[[Entry], bool]:
    if base is None:
        return lambda _: True
    if isinstance(base, str) and base.startswith("sha256:"):
        return lambda entry: entry.fingerprint == base
    found = base if isinstance(base, Fingerprint) else fingerprint(base)
    return lambda entry: entry.samples is not None and not same_base(entry.samples, found)


def read_entry(folder: Path) -> Entry:
    """What an adapter's folder says, ours or PEFT's; its weights stay on disk.

    Errors: `DamagedAdapter` with all faults; `StoreError` for what cannot be read.
    """
    with readable(folder):
        header = read_header(file_inside(folder, WEIGHTS))
        return _ours(folder, header) if manifests.is_ours(folder) else _peft(folder, header)


def _ours(folder: Path, header: Mapping[str, TensorInfo]) -> Entry:
    manifest, faults = read_manifest(folder, check=sizes)
    if manifest is not None:
        faults += check_tensors(manifest, header)
    if manifest is None or faults:
        raise DamagedAdapter("the adapter cannot be trusted", where=folder, faults=faults)
    metrics = manifest.record.get("metrics")
    own = (folder / manifests.NAME).stat().st_size
    return Entry(
        name=folder.name,
        method=manifest.config.method,
        rank=manifest.config.r if isinstance(manifest.config, LoRA) else None,
        base=manifest.base_name,
        base_revision=manifest.base_revision,
        fingerprint=manifest.base.id,
        digest=manifest.files[WEIGHTS][1],
        numbers=_numbers(header),
        size=own + sum(size for size, _ in manifest.files.values()),
        metrics=metrics if isinstance(metrics, Mapping) else {},
        samples=manifest.base,
        config=manifest.config,
    )


def _peft(folder: Path, header: Mapping[str, TensorInfo]) -> Entry:
    values, settings = trusted_settings(folder)
    name = values.get("base_model_name_or_path")
    return Entry(
        name=folder.name,
        method=LoRA.method,
        rank=settings.r,
        base=name if isinstance(name, str) else None,
        base_revision=None,
        fingerprint=None,
        digest=None,
        numbers=_numbers(header),
        size=sum(found.stat().st_size for found in os.scandir(folder) if found.is_file()),
    )


def _numbers(header: Mapping[str, TensorInfo]) -> int:
    return sum(math.prod(info.shape) for info in header.values())
