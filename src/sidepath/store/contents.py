"""What an adapter's folder says, checked against the model before anything is allocated (floor 4).

A folder with a manifest is ours; one without is read as PEFT's, with the same strictness.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sidepath.errors import ConfigError, DamagedAdapter, StoreError
from sidepath.injection.architecture import modules_of
from sidepath.injection.places import token_tables
from sidepath.injection.registry import base_parameters
from sidepath.methods.base import Method, Site
from sidepath.methods.lora import LoRA
from sidepath.store import manifest as manifests
from sidepath.store.folder import names_in, readable
from sidepath.store.loading import Loaded, loading
from sidepath.store.manifest import Manifest, all_but, check_file, check_tensors, read_manifest
from sidepath.store.new_tokens import NAME as TOKENS_FILE
from sidepath.store.new_tokens import read_tokens
from sidepath.store.peft_config import read_settings
from sidepath.store.peft_format import (
    CONFIG,
    WEIGHTS,
    Slot,
    by_place,
    check_keys,
    slots_of,
    unpack,
)
from sidepath.store.peft_reading import lora_of, sites_of
from sidepath.store.peft_tokens import misfits
from sidepath.store.plain_format import expected_slots
from sidepath.store.tensors import (
    PICKLES,
    TensorInfo,
    file_inside,
    read_head,
    read_json,
    refuse_pickle,
    there,
)


@dataclass
class Contents:
    """A checked adapter folder: where its deltas go and which tensors fill them."""

    config: Method
    sites: list[Site]
    modules: Mapping[str, nn.Module]
    """The base's modules by path."""
    slots: list[Slot]
    path: Path
    header: Mapping[str, TensorInfo]
    manifest: Manifest | None
    copies: dict[str, str]
    """Keys that repeat a parameter of the base (PEFT saves adapted embeddings so): its name."""
    tokens: dict[str, int] = field(default_factory=dict)
    """The tokens that it brings, by their texts."""
    head: bytes = b""
    """The bytes of the file that `header` was read from."""

    @contextmanager
    def loading(self, model: nn.Module) -> Iterator[Loaded]:
        """The tensors, on the CPU, all finite; the digest of the bytes loaded is taken meanwhile.

        Errors: `DamagedAdapter`.
        """
        digest = (self.head, self.manifest.files[WEIGHTS][1]) if self.manifest else None
        with loading(self.path, self.header, digest) as loaded:
            self._check_copies(model, loaded.tensors)
            yield loaded

    def placed(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """The file's tensors by module path and name within the delta.

        Errors: `DamagedAdapter` for a form that PEFT's names cannot mean.
        """
        if isinstance(self.config, LoRA):
            return unpack(tensors, self.sites, self.modules, self.slots)
        return by_place(tensors, self.slots)

    def _check_copies(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        parameters = dict(base_parameters(model)) if self.copies else {}
        faults = [
            f"{key}: differs from the base's {name}: another base, or an embedding trained whole "
            "without being listed in modules_to_save"
            for key, name in self.copies.items()
            if not _same(tensors[key], parameters[name].detach().cpu())
        ]
        if faults:
            raise DamagedAdapter(
                "the adapter does not fit the base", where=self.path, faults=faults
            )


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.to(other.dtype), other) or torch.equal(other.to(one.dtype), one)


def read_folder(model: nn.Module, folder: Path) -> Contents:
    """Check an adapter's folder against `model`; loads and changes nothing.

    Errors: one `DamagedAdapter` with all faults; `StoreError` when the folder is no adapter's, or
    cannot be read.
    """
    with readable(folder):
        return _read_folder(model, folder)


def _read_folder(model: nn.Module, folder: Path) -> Contents:
    refuse_other_folders(folder)
    modules = dict(modules_of(model))
    faults: list[str] = []
    header: Mapping[str, TensorInfo] = {}
    path = file_inside(folder, WEIGHTS)
    head = b""
    try:
        header, head = read_head(path)
    except DamagedAdapter as error:
        faults += [f"{WEIGHTS}: {fault}" for fault in error.faults or [error.what]]
    if manifests.is_ours(folder):
        contents, found = _ours(model, modules, folder, path, header)
    else:
        contents, found = _peft(model, modules, folder, path, header)
    faults += found
    if contents is not None:
        contents.head = head
        if faults and contents.manifest is not None and WEIGHTS in contents.manifest.files:
            # Nothing will be loaded, so that nothing else takes the weights' digest.
            faults += check_file(folder, WEIGHTS, *contents.manifest.files[WEIGHTS])
    return _without(faults, contents, folder)


def contents_of(
    model: nn.Module, values: Any, header: Mapping[str, TensorInfo], where: Path | None
) -> Contents:
    """`read_folder` of PEFT's settings and tensors that are in memory; `where` is for the error.

    Errors: one `DamagedAdapter` with all faults.
    """
    contents, faults = _of_peft(model, dict(modules_of(model)), values, Path(), header)
    return _without(faults, contents, where)


def _without(faults: list[str], contents: Contents | None, where: Path | None) -> Contents:
    if contents is None or faults:
        raise DamagedAdapter(
            "the adapter cannot be trusted or does not fit this model",
            where=where,
            faults=faults,
            hint="fetch or save it again; check that it was made for this model",
        )
    return contents


def refuse_other_folders(folder: Path) -> None:
    """Raise `StoreError` where there is no adapter, and why not; a pickle is named."""
    if not folder.is_dir():
        raise StoreError("there is no adapter folder of this name", where=folder)
    if there(folder / WEIGHTS):
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("adapter_model") and path.name.endswith(PICKLES):
            refuse_pickle(path)
    raise StoreError(
        "the folder holds no adapter",
        where=folder,
        found=names_in(folder) or "nothing",
        expected=f"{WEIGHTS} and {CONFIG}",
    )


Read = tuple[Contents | None, list[str]]


def _ours(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    folder: Path,
    path: Path,
    header: Mapping[str, TensorInfo],
) -> Read:
    manifest, faults = read_manifest(folder, check=all_but(WEIGHTS))
    if manifest is None:
        return None, faults
    config = manifest.config
    if isinstance(config, LoRA):
        slots, more = slots_of(modules, config, manifest.sites)
    else:
        slots, more = expected_slots(model, config, manifest.sites)
    faults += more
    if header:
        faults += check_tensors(manifest, header) or check_keys(slots, header)
    sites = list(manifest.sites)
    rows = config.token_rows if isinstance(config, LoRA) else ()
    tokens, more = read_tokens(folder, rows, ours=True)
    if tokens and TOKENS_FILE not in manifest.files:
        more.append(f"{TOKENS_FILE}: not listed in {manifests.NAME}")
    contents = Contents(config, sites, modules, slots, path, header, manifest, {}, tokens)
    return contents, faults + more


def _peft(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    folder: Path,
    path: Path,
    header: Mapping[str, TensorInfo],
) -> Read:
    try:
        values: Any = read_json(file_inside(folder, CONFIG))
    except ValueError as error:
        return None, [f"{CONFIG}: not JSON: {error}"]
    except DamagedAdapter as error:
        return None, [f"{CONFIG}: {error.what}"]
    contents, faults = _of_peft(model, modules, values, path, header)
    if contents is not None and isinstance(contents.config, LoRA):
        contents.tokens, more = read_tokens(folder, contents.config.token_rows, ours=False)
        faults = faults + more
    return contents, faults


def _of_peft(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    values: Any,
    path: Path,
    header: Mapping[str, TensorInfo],
) -> Read:
    settings, faults = read_settings(values)
    faults = [f"{CONFIG}: {fault}" for fault in faults]
    if not header:
        return None, faults
    sites, copies, ignored = sites_of(modules, settings, header)
    try:
        config = lora_of(modules, settings, sites, header)
    except ConfigError as error:
        return None, [*faults, f"{CONFIG}: {error}"]
    except ValueError as error:
        return None, [*faults, str(error)]
    used = {key: info for key, info in header.items() if key not in {*copies, *ignored}}
    slots, more = slots_of(modules, config, sites)
    faults += more + check_keys(slots, used)
    if config.token_rows:
        faults += misfits(config.token_rows, sites, modules, token_tables(model))
    return Contents(config, sites, modules, slots, path, header, None, copies), faults
