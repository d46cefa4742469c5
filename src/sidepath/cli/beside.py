"""Adapters that are loaded beside the one at hand: those that a fusion composes (floor 7)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import nn

from sidepath.cli.output import note
from sidepath.errors import ConfigError, StoreError
from sidepath.injection.registry import require_registry
from sidepath.methods.base import Method
from sidepath.methods.bottleneck import AdapterLayer
from sidepath.methods.fusion import AdapterFusion
from sidepath.store.adapter import Adapter, load
from sidepath.store.hub import ADAPTER, local


def composing(method: Method, beside: Mapping[str, str]) -> Method:
    """The method to train with these adapters beside it: a fusion composes all, unless it names
    its own.

    Errors: `ConfigError` for a method that composes nothing, `StoreError` for missing folders.
    """
    require_use(method, beside)
    missing = [
        f"{name}={folder}" for name, folder in beside.items() if not local(folder, ADAPTER).is_dir()
    ]
    if missing:
        raise StoreError("there are no such adapter folders", faults=missing)
    if isinstance(method, AdapterFusion) and not method.adapters:
        return dataclasses.replace(method, adapters=tuple(beside))
    return method


def require_use(method: Method, beside: Mapping[str, str]) -> None:
    """Errors: `ConfigError` where adapters stand beside one that would not look at them."""
    if beside and not isinstance(method, AdapterFusion):
        raise ConfigError(
            f"--beside {', '.join(beside)}: the adapter composes no others",
            found=f"method {method.method}",
            expected=f"method {AdapterFusion.method}",
            hint="leave --beside out",
        )


def load_beside(
    model: nn.Module, beside: Mapping[str, str], *, allow_other_base: bool = False
) -> None:
    """Load adapters onto a base under their names, frozen. In place; errors as of `load`."""
    for name, folder in beside.items():
        load(model, folder, name, allow_other_base=allow_other_base)


def tell_silent(adapter: Adapter, beside: Mapping[str, str]) -> None:
    """Count the places where adapters stand and the fusion over them does not."""
    installed = require_registry(adapter.model).adapters
    for name in beside:
        places = [
            path
            for path, delta in installed[name].deltas.items()
            if isinstance(delta, AdapterLayer)
        ]
        silent = [path for path in places if path not in adapter.deltas]
        if silent:
            note(
                f'beside       "{name}" is silent at {len(silent)} of its {len(places)} places, '
                f"such as {silent[0]}: no fusion stands there (--targets)"
            )


def name_besides(wanted: str, beside: Mapping[str, str]) -> str:
    """A name for one more adapter: the wanted one, or one like it that is still free."""
    names = [wanted, *(f"{wanted}-{number}" for number in range(len(beside)))]
    return next(name for name in names if name not in beside)
