"""Writing the files of an adapter's folder (floor 4)."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from sidepath.core.views import DenseView, view_of
from sidepath.errors import StoreError
from sidepath.injection.architecture import modules_of
from sidepath.injection.registry import Installed
from sidepath.methods.lora import LoRA
from sidepath.store import manifest as manifests
from sidepath.store import new_tokens
from sidepath.store.card import CARD, model_card
from sidepath.store.fingerprint import fingerprint
from sidepath.store.folder import lists_all_files, publish
from sidepath.store.hub import Place, snapshot_of
from sidepath.store.manifest import Manifest, write_manifest
from sidepath.store.peft_format import CONFIG, WEIGHTS, pack
from sidepath.store.peft_writing import write_settings
from sidepath.store.plain_format import slots_of
from sidepath.store.tensors import DTYPE_NAMES, file_inside

OWN_NAMES = (WEIGHTS, CONFIG, CARD, new_tokens.NAME, manifests.NAME)


def write_adapter(
    model: nn.Module,
    installed: Installed,
    folder: Path,
    files: Mapping[str, str],
    record: Mapping[str, Any],
) -> None:
    """Write an adapter's files into an empty folder, the manifest last. Changes nothing else.

    `files`: more text files by name; `record`: how the adapter came to be.
    Errors: `StoreError` for a method or a tensor that the format cannot hold.
    """
    config = installed.config.saved()
    slots = slots_of(installed, dict(modules_of(model)))
    tensors = pack(installed.deltas, views_of(model, installed), slots)
    for name, text in files.items():
        if Path(name).name != name or name in OWN_NAMES:
            raise StoreError("a file saved with an adapter cannot have this name", found=name)
        (folder / name).write_text(text, encoding="utf-8")
    if installed.tokens:
        text = new_tokens.as_text(installed.tokens)
        (folder / new_tokens.NAME).write_text(text, encoding="utf-8")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if isinstance(config, LoRA):  # the one method here that PEFT has a form for
        named = base_name(model), base_revision(model)
        settings = write_settings(model, config, installed.sites, *named)
        (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    manifest = _manifest_of(model, installed, tensors, record)
    trained = sum(parameter.numel() for parameter in installed.parameters())
    card = model_card(manifest, installed.name, trained)
    (folder / CARD).write_text(card, encoding="utf-8")
    write_manifest(folder, manifest)


def _manifest_of(
    model: nn.Module,
    installed: Installed,
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any],
) -> Manifest:
    sites = installed.sites
    return Manifest(
        config=installed.config.saved(),
        sites=tuple(sites.values()),
        base_name=base_name(model),
        base_revision=base_revision(model),
        model_class=type(model).__name__,
        labels=labels_of(model),
        base=fingerprint(
            model, leave_out=[path for path, site in sites.items() if site.kind == "whole"]
        ),
        tensors=_held(tensors),
        record=record,
    )


def _held(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtypes and shapes by key, as a manifest lists them."""
    return {key: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for key, t in tensors.items()}


def publish_adapter(
    target: Path,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    manifest: Manifest | None,
    files: Mapping[str, bytes],
) -> None:
    """Write the folder of an adapter that stands on no model; all or nothing.

    `tensors` by PEFT's keys, `settings` for `adapter_config.json`, `files` to lie beside them. With
    a `manifest` (whose list of tensors is made here) the folder is one of ours, without one
    PEFT's. Errors: `WriteFailed`, `StoreError` for a folder that holds other files.
    """
    with publish(target, manifests=(), replace=replaceable) as temporary:
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        save_file(dict(tensors), temporary / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(settings, indent=2) + "\n"
        (temporary / CONFIG).write_text(text, encoding="utf-8")
        if manifest is not None:
            manifest = dataclasses.replace(manifest, tensors=_held(tensors))
            card = model_card(manifest, target.name, sum(t.numel() for t in tensors.values()))
            (temporary / CARD).write_text(card, encoding="utf-8")
            write_manifest(temporary, manifest)


def merged_record(
    earlier: Mapping[str, Any], metrics: Mapping[str, Any] | None, record: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What an earlier save recorded, overlaid by what is new; the versions are today's."""
    values = {**earlier, "versions": _versions(), **(record or {})}
    if metrics is not None:
        values["metrics"] = dict(metrics)
    return values


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("sidepath", "torch", "transformers", "safetensors"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def views_of(model: nn.Module, installed: Installed) -> dict[str, DenseView | None]:
    """The view of each module that an adapter stands beside; None where it holds no matrix."""
    modules = dict(modules_of(model))
    return {path: view_of(modules[path]) for path in installed.deltas}


def loaded_from(model: nn.Module) -> str | None:
    """What a transformers model says it was loaded from: a folder, or a name on the hub."""
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    return name if isinstance(name, str) and name else None


def called(base: Place) -> tuple[str, str | None]:
    """What a base's folder is called in a record: its repository and commit where it is one of the
    hub's cache; else as it was given, and None.
    """
    place = snapshot_of(base)
    return (os.fspath(base), None) if place is None else (place.name, place.revision)


def base_name(model: nn.Module) -> str | None:
    """What a transformers model is called: a name on the hub, or the folder it was loaded from."""
    name = loaded_from(model)
    return None if name is None else called(name)[0]


def base_revision(model: nn.Module) -> str | None:
    """The commit of a model that was loaded from the hub, by us or by transformers."""
    name = loaded_from(model)
    commit = None if name is None else called(name)[1]
    commit = commit or getattr(getattr(model, "config", None), "_commit_hash", None)
    return commit if isinstance(commit, str) and commit else None


def labels_of(model: nn.Module) -> list[str] | None:
    """A classifier's label names in the order of its outputs; None for other models."""
    if not type(model).__name__.endswith("Classification"):
        return None
    names = getattr(getattr(model, "config", None), "id2label", None)
    return [str(names[index]) for index in sorted(names)] if isinstance(names, dict) else None


def saved_beside(folder: Path, manifest: Manifest | None) -> dict[str, bytes]:
    """What lies in an adapter's folder beside its own files, and the document of its new tokens.

    Errors: `DamagedAdapter` for a file that is missing or leads elsewhere.
    """
    own = {*OWN_NAMES} - {new_tokens.NAME}
    names = [name for name in (manifest.files if manifest else ()) if name not in own]
    if manifest is None and (folder / new_tokens.NAME).is_file():
        names = [new_tokens.NAME]
    return {name: file_inside(folder, name).read_bytes() for name in names}


def replaceable(folder: Path) -> bool:
    """Whether a folder holds an adapter, ours or PEFT's, and nothing else: it may be replaced."""
    return lists_all_files(folder, (manifests.NAME,)) or plain_peft(folder)


def plain_peft(folder: Path) -> bool:
    """Whether a folder holds what PEFT saves for an adapter, and nothing else."""
    names = {path.name for path in folder.iterdir()}
    return {WEIGHTS, CONFIG} <= names <= {WEIGHTS, CONFIG, CARD, new_tokens.NAME}
