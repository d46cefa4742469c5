"""What an adapter's folder says, checked against the model before anything is allocated (floor 4).

A folder with a manifest is ours; one without is read as PEFT's, with the same strictness.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sidepath.core.views import view_of
from sidepath.errors import ConfigError, DamagedAdapter, StoreError
from sidepath.injection.architecture import modules_of
from sidepath.injection.registry import base_parameters
from sidepath.methods.base import Method, Site
from sidepath.methods.lora import LoRA, name_matches
from sidepath.store import manifest as manifests
from sidepath.store.loading import Loaded, loading
from sidepath.store.manifest import Manifest, check_file, check_tensors, read_manifest
from sidepath.store.peft_config import PeftSettings, commonest, read_settings
from sidepath.store.peft_format import (
    CONFIG,
    ENDINGS,
    PREFIX,
    WEIGHTS,
    Slot,
    check_keys,
    groups_of,
    slots_of,
    unpack,
)
from sidepath.store.plain_format import by_place, expected_slots
from sidepath.store.tensors import (
    PICKLES,
    TensorInfo,
    file_inside,
    read_head,
    refuse_pickle,
    strict_json,
)

T = TypeVar("T", int, float)
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_COPY_OF_EMBEDDING = (".base_layer.weight", ".weight")
_LEFT_BY_PEFT = ("original_module.", "modules_to_save.")


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

    Errors: one `DamagedAdapter` with all faults; `StoreError` when the folder is no adapter's.
    """
    _refuse_other_folders(folder)
    modules = dict(modules_of(model))
    faults: list[str] = []
    header: Mapping[str, TensorInfo] = {}
    path = file_inside(folder, WEIGHTS)
    head = b""
    try:
        header, head = read_head(path)
    except DamagedAdapter as error:
        faults += [f"{WEIGHTS}: {fault}" for fault in error.faults or [error.what]]
    if (folder / manifests.NAME).exists() or (folder / manifests.NAME).is_symlink():
        contents, found = _ours(model, modules, folder, path, header)
    else:
        contents, found = _peft(modules, folder, path, header)
    faults += found
    if contents is not None:
        contents.head = head
        if faults and contents.manifest is not None and WEIGHTS in contents.manifest.files:
            # Nothing will be loaded, so that nothing else takes the weights' digest.
            faults += check_file(folder, WEIGHTS, *contents.manifest.files[WEIGHTS])
    if contents is None or faults:
        raise DamagedAdapter(
            "the adapter cannot be trusted or does not fit this model",
            where=folder,
            faults=faults,
            hint="fetch or save it again; check that it was made for this model",
        )
    return contents


def _refuse_other_folders(folder: Path) -> None:
    if not folder.is_dir():
        raise StoreError("there is no adapter folder of this name", where=folder)
    if (folder / WEIGHTS).exists() or (folder / WEIGHTS).is_symlink():
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("adapter_model") and path.name.endswith(PICKLES):
            refuse_pickle(path)
    raise StoreError(
        "the folder holds no adapter",
        where=folder,
        found=", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing",
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
    manifest, faults = read_manifest(folder, later=WEIGHTS)
    if manifest is None:
        return None, faults
    config = manifest.config
    needed = (WEIGHTS, CONFIG) if isinstance(config, LoRA) else (WEIGHTS,)
    missing = [name for name in needed if name not in manifest.files]
    faults += [f"{name}: not listed in {manifests.NAME}" for name in missing]
    if isinstance(config, LoRA):
        slots, more = slots_of(modules, config, manifest.sites)
    else:
        slots, more = expected_slots(model, config, manifest.sites)
    faults += more
    if header:
        faults += check_tensors(manifest, header) or check_keys(slots, header)
    sites = list(manifest.sites)
    return Contents(config, sites, modules, slots, path, header, manifest, {}), faults


def _peft(
    modules: Mapping[str, nn.Module], folder: Path, path: Path, header: Mapping[str, TensorInfo]
) -> Read:
    try:
        values: Any = strict_json(file_inside(folder, CONFIG).read_bytes())
    except ValueError as error:
        return None, [f"{CONFIG}: not JSON: {error}"]
    except DamagedAdapter as error:
        return None, [f"{CONFIG}: {error.what}"]
    settings, faults = read_settings(values)
    faults = [f"{CONFIG}: {fault}" for fault in faults]
    if not header:
        return None, faults
    sites, copies, ignored = _peft_sites(modules, settings, header)
    try:
        config = _peft_config(modules, settings, sites, header)
    except ConfigError as error:
        return None, [*faults, f"{CONFIG}: {error}"]
    except ValueError as error:
        return None, [*faults, str(error)]
    used = {key: info for key, info in header.items() if key not in {*copies, *ignored}}
    slots, more = slots_of(modules, config, sites)
    faults += more + check_keys(slots, used)
    return Contents(config, sites, modules, slots, path, header, None, copies), faults


def _peft_sites(
    modules: Mapping[str, nn.Module], settings: PeftSettings, header: Mapping[str, TensorInfo]
) -> tuple[list[Site], dict[str, str], set[str]]:
    """Where a PEFT file's tensors go, read off their names."""
    names = [key.removeprefix(PREFIX) for key in header if key.startswith(PREFIX)]
    whole = [
        path
        for path in modules
        if path.endswith(settings.modules_to_save) and any(n.startswith(f"{path}.") for n in names)
    ]
    whole = [path for path in whole if not path.startswith(tuple(f"{other}." for other in whole))]
    sites = {path: Site(path, "whole", pattern=path) for path in whole}
    copies, ignored = {}, set()
    for name in names:
        root = next((path for path in whole if name.startswith(f"{path}.")), None)
        ending = next((ending for ending in ENDINGS if name.endswith(ending)), None)
        owner = name.rpartition(".")[0]
        embedding = _embedding_copied(modules, name)
        if root is not None:
            if name.removeprefix(f"{root}.").startswith(_LEFT_BY_PEFT):
                ignored.add(PREFIX + name)
        elif ending is not None:
            path = name.removesuffix(ending)
            sites[path] = Site(path, "dense", pattern=path)
        elif settings.bias == "all" and name.endswith(".bias") and owner in modules:
            sites.setdefault(owner, Site(owner, "bias", pattern=owner))
        elif embedding is not None:
            copies[PREFIX + name] = embedding
    order = {path: number for number, path in enumerate(modules)}
    ordered = sorted(sites.values(), key=lambda site: order.get(site.path, len(order)))
    return ordered, copies, ignored


def _embedding_copied(modules: Mapping[str, nn.Module], name: str) -> str | None:
    for ending in _COPY_OF_EMBEDDING:
        module = modules.get(name.removesuffix(ending)) if name.endswith(ending) else None
        if isinstance(module, nn.Embedding | nn.Linear):
            return name.removesuffix(ending) + ".weight"
    return None


def _peft_config(
    modules: Mapping[str, nn.Module],
    settings: PeftSettings,
    sites: list[Site],
    header: Mapping[str, TensorInfo],
) -> LoRA:
    dense = [site.path for site in sites if site.kind == "dense"]
    if not dense:
        raise ValueError(f"{WEIGHTS}: holds no lora_A and lora_B tensors")
    ranks, alphas = {}, {}
    for path in dense:
        view = view_of(modules[path]) if path in modules else None
        groups = groups_of(view) if view else 1
        rank = settings.rank_at(path)
        if rank % groups:
            raise ValueError(f"{path}: rank {rank} does not divide into {groups} groups")
        ranks[path] = rank // groups
        alphas[path] = settings.alpha_at(path) / (groups**0.5 if settings.rslora else groups)
    r, rank_pattern = per_path(ranks)
    alpha, alpha_pattern = per_path(alphas)
    dtypes = {info.dtype for key, info in header.items() if key.endswith(ENDINGS[:4])}
    dtype = _DTYPES.get(dtypes.pop(), "float32") if len(dtypes) == 1 else "float32"
    return LoRA(
        r=r,
        alpha=alpha,
        dropout=settings.dropout,
        targets=tuple(dense),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        bias=settings.bias,  # type: ignore[arg-type]
        train_whole=tuple(s.path for s in sites if s.kind == "whole"),
        scaling="alpha/sqrt(r)" if settings.rslora else "alpha/r",
        dtype=dtype,  # type: ignore[arg-type]
        dora=settings.dora,
    )


def per_path(values: Mapping[str, T]) -> tuple[T, dict[str, T]]:
    """A default and per-module patterns that give each path its value."""
    default = commonest(values.values())
    others = {path: value for path, value in values.items() if value != default}
    if any(name_matches(key, path) for key in others for path in values if path not in others):
        others = dict(values)
    # The last match wins: a path comes after every path that is a tail of it.
    ordered = sorted(others, key=lambda path: path.count("."))
    return default, {glob.escape(path): others[path] for path in ordered}
