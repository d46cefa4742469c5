"""A base's modules without their memory, and what a manifest says of a base on disk (floor 6)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sidepath.injection.registry import base_parameters
from sidepath.methods.base import Site
from sidepath.methods.lora import LoRA
from sidepath.store.configs import model_without_weights
from sidepath.store.fingerprint import Fingerprint, fingerprint
from sidepath.store.manifest import Manifest
from sidepath.store.saving import called, labels_of
from sidepath.store.stored import stored_name


def described(
    base: Path,
    config: LoRA,
    sites: Sequence[Site],
    record: Mapping[str, Any],
    skeleton: nn.Module | None = None,
) -> Manifest:
    """The manifest of an adapter for the base in a folder, which is not loaded.

    `skeleton`: the model that the adapter is for, where that is not the class of the base's config.
    """
    model = model_without_weights(base, "auto") if skeleton is None else skeleton
    whole = [site.path for site in sites if site.kind == "whole"]
    name, revision = called(base)
    return Manifest(
        config=config,
        sites=tuple(sites),
        base_name=name,
        base_revision=revision,
        model_class=type(model).__name__,
        labels=labels_of(model),
        base=fingerprint_as(model, base, whole),
        tensors={},
        record=record,
    )


def fingerprint_as(model: nn.Module, base: Path, leave_out: Iterable[str] = ()) -> Fingerprint:
    """The fingerprint that a model of this class would have with the base's weights.

    Each parameter once and by the model's own name, as `fingerprint` reads a model; parameters that
    the folder does not store are new at each load and left out.
    """
    samples = fingerprint(base).samples
    found = {}
    for name, _ in base_parameters(model):
        own = stored_name(name, samples)
        if own is not None:
            found[name] = samples[own]
    return Fingerprint(found).without(leave_out)
