"""An adapter held against its base: what only the base tells, and its fingerprint (floor 5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from sidepath.convert.portable import Base, Portable
from sidepath.errors import DamagedAdapter, StoreError, WrongBase
from sidepath.injection.registry import base_parameters
from sidepath.methods.lora import LoRA
from sidepath.store.contents import Contents, contents_of
from sidepath.store.fingerprint import Fingerprint, fingerprint, same_base
from sidepath.store.manifest import Manifest
from sidepath.store.peft_writing import write_settings
from sidepath.store.saving import base_name, labels_of
from sidepath.store.stored import Checkpoint
from sidepath.store.tensors import DTYPE_NAMES, TensorInfo


def on_base(portable: Portable, base: Base) -> Portable:
    """The adapter with its settings as its base wants them, and a manifest that names the base.

    Names and shapes are checked against the base's; its fingerprint is read from its folder, 16
    values a tensor. An adapter with a manifest keeps it, unless its base is known to be another.

    Errors: `DamagedAdapter` with all faults where it does not fit; `WrongBase`; `StoreError`.
    """
    found = _sampled(base)
    if portable.manifest is not None:
        _refuse_other(portable.manifest, found, base)
    contents = on_names(portable, base)
    if portable.manifest is not None:
        return portable
    tensors = _without_copies(portable.tensors, contents, base)
    config = contents.config
    assert isinstance(config, LoRA), "PEFT's form is one of LoRA"
    sites = {site.path: site for site in contents.sites}
    values = write_settings(base.model, config, sites, base_name(base.model))
    manifest = None
    if found is not None:
        whole = tuple(f"{path}." for path, site in sites.items() if site.kind == "whole")
        samples = {key: one for key, one in found.samples.items() if not key.startswith(whole)}
        manifest = Manifest(
            config=config,
            sites=tuple(contents.sites),
            base_name=base_name(base.model),
            model_class=type(base.model).__name__,
            labels=labels_of(base.model),
            base=Fingerprint(samples),
            tensors={key: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for key, t in tensors.items()},
        )
    return dataclasses.replace(portable, tensors=tensors, values=values, manifest=manifest)


def on_names(portable: Portable, base: Base) -> Contents:
    """Where each tensor goes, once names and shapes were held against the base's.

    Errors: `DamagedAdapter` with all faults.
    """
    header = {
        key: TensorInfo(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), 0, 0)
        for key, tensor in portable.tensors.items()
    }
    return contents_of(base.model, portable.values, header, base.folder)


def _refuse_other(manifest: Manifest, found: Fingerprint | None, base: Base) -> None:
    faults = [] if found is None else same_base(manifest.base, found)
    if faults:
        raise WrongBase(
            "the adapter was made for another base",
            where=base.folder,
            expected=f"a base with fingerprint {manifest.base.id}",
            faults=faults,
            hint="give the base that it was made for",
        )


def _sampled(base: Base) -> Fingerprint | None:
    """The fingerprint of the base's folder, without what a checkpoint holds beside parameters."""
    if base.folder is None:
        return None
    stored = fingerprint(base.folder)
    names = {name for name, _ in base_parameters(base.model)}
    shorter = {name.partition(".")[2] for name in names}
    prefix = f"{getattr(base.model, 'base_model_prefix', '')}."
    known = {
        name: sample
        for name, sample in stored.samples.items()
        if name in names or name in shorter or name.removeprefix(prefix) in names
    }
    if not known:
        raise StoreError(
            "the base's checkpoint holds none of the parameters that its config tells of",
            where=base.folder,
        )
    return Fingerprint(known)


def _without_copies(
    tensors: Mapping[str, Tensor], contents: Contents, base: Base
) -> dict[str, Tensor]:
    """Without what repeats the base (PEFT saves adapted embeddings so), once that was seen."""
    faults = []
    checkpoint = Checkpoint(base.folder) if contents.copies and base.folder is not None else None
    for key, name in contents.copies.items():
        stored = checkpoint.read(name) if checkpoint is not None and name in checkpoint else None
        if stored is None or not torch.equal(tensors[key].to(stored.dtype), stored):
            faults.append(f"{key}: is not the base's {name}")
    if faults:
        raise DamagedAdapter("the adapter does not fit the base", where=base.folder, faults=faults)
    own = {slot.key for slot in contents.slots}
    return {key: tensor for key, tensor in tensors.items() if key in own}
