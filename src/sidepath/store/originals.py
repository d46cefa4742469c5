"""The weights a quantised base was made from, read one at a time (floor 4)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sidepath.core.quant import stored_transposed
from sidepath.core.views import PackedView, view_of
from sidepath.errors import ConfigError, StoreError
from sidepath.injection.registry import Installed
from sidepath.methods.base import Method, Site
from sidepath.methods.lora import LoRA
from sidepath.methods.lowrank import LowRank
from sidepath.store.fingerprint import (
    Fingerprint,
    fingerprint,
    fingerprint_of,
    same_base,
)
from sidepath.store.saving import loaded_from
from sidepath.store.stored import Checkpoint, stored_name

Originals = str | os.PathLike[str] | Mapping[str, Tensor] | None
"""A transformers folder, the tensors by parameter name, or None: the model's own folder."""
Residuals = Mapping[str, Callable[[], Tensor]]
"""For each packed site what quantising took away, `W - Q (O, I)`, made when it is asked for."""


def residual_source(
    model: nn.Module, config: Method, sites: Iterable[Site], originals: Originals
) -> Residuals:
    """Where a start from residuals finds them; empty when `config` asks for no such start.

    Nothing is read but headers and samples: the originals are checked to be what the base was
    quantised from. Errors: `ConfigError` when no target is quantised or no originals are known,
    `StoreError` when they lack a weight or are another base's.
    """
    if not isinstance(config, LoRA) or config.start != "loftq":
        if originals is not None:
            raise ConfigError('originals are read by LoRA(start="loftq") alone')
        return {}
    modules = dict(model.named_modules())
    views = {site.path: view_of(modules[site.path]) for site in sites if site.kind == "dense"}
    packed = {path: view for path, view in views.items() if isinstance(view, PackedView)}
    if not packed:
        raise ConfigError(
            'start="loftq" needs a quantised base: there is no residual to start from',
            found="no target is a 4-bit layer",
            hint="load the base with --quantise nf4, or choose another start",
        )
    readers = _readers(model, originals)
    found: dict[str, Callable[[], Tensor]] = {}
    faults = []
    for path, view in packed.items():
        name = stored_name(f"{path}.weight", readers)
        if name is None:
            faults.append(f"{path}.weight: missing")
        else:
            found[path] = _residual(path, view, readers[name])
    if faults:
        raise StoreError("the originals lack weights of the base", faults=faults)
    return found


def start_at_residuals(installed: Installed, residuals: Residuals) -> None:
    """Start each delta beside a packed layer at that layer's residual. In place, one at a time."""
    for path, residual in residuals.items():
        delta = installed.deltas[path]
        assert isinstance(delta, LowRank)
        delta.start_at_(residual())


def _residual(path: str, view: PackedView, read: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def residual() -> Tensor:
        W = read().to(view.weight.device, torch.float32)
        if not torch.isfinite(W).all():
            raise StoreError("an original weight is not finite", where=f"{path}.weight")
        return (W.T if stored_transposed(view.module) else W) - view.matrix()

    return residual


def _readers(model: nn.Module, originals: Originals) -> dict[str, Callable[[], Tensor]]:
    """By name, how to get each original tensor."""
    if isinstance(originals, Mapping):
        _refuse_other(model, fingerprint_of(originals), None)
        return {name: tensor.detach for name, tensor in originals.items()}
    folder = loaded_from(model) if originals is None else originals
    if folder is None or not Path(folder).is_dir():
        raise ConfigError(
            'start="loftq" needs the unquantised weights',
            found=f"the model says it was loaded from {folder}" if folder else None,
            hint="inject(..., originals=FOLDER), a transformers folder of the unquantised base",
        )
    _refuse_other(model, fingerprint(folder), folder)
    stored = Checkpoint(Path(folder))
    return {name: partial(stored.read, name) for name in stored if stored.floating(name)}


def _refuse_other(model: nn.Module, found: Fingerprint, where: object) -> None:
    faults = same_base(fingerprint(model), found)
    faults = [fault for fault in faults if not fault.endswith(": missing")]
    if faults:
        raise StoreError("the originals are another base's", where=where, faults=faults)
