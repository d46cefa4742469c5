"""An adapter's updates and the weights they stand beside, read one at a time (floor 7)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sidepath.analyse import Factors, against
from sidepath.cli.output import note, progress
from sidepath.core.views import view_of
from sidepath.errors import DamagedAdapter, WrongBase
from sidepath.injection.architecture import modules_of
from sidepath.store import manifest as manifests
from sidepath.store.configs import model_without_weights
from sidepath.store.fingerprint import fingerprint, same_base
from sidepath.store.stored import Checkpoint


def require_base(adapter: Path, folder: Path) -> None:
    """Raise `WrongBase` unless the base in `folder` is the one the adapter's manifest names."""
    if not manifests.is_ours(adapter):
        note(f"note: {adapter}: no {manifests.NAME}: its base could not be verified")
        return
    faults = same_base(manifests.trusted_manifest(adapter).base, fingerprint(folder))
    if faults:
        raise WrongBase("the adapter was made for another base", where=folder, faults=faults)


def norms_of(folder: Path, found: Mapping[str, Factors]) -> dict[str, float]:
    """The Frobenius norm of each adapted weight that the base's checkpoint holds."""
    return {name: float(weight.double().norm()) for name, weight in _weights(folder, found)}


def held_against(folder: Path, found: Mapping[str, Factors], widest: int) -> list[dict[str, Any]]:
    """Each update against its weight, in the adapter's order; weights above `widest` are left out.

    Errors: `DamagedAdapter` where an update has not the size of its weight.
    """
    views = {
        path: view
        for path, module in modules_of(model_without_weights(folder, "auto"))
        if (view := view_of(module)) is not None
    }
    rows: dict[str, dict[str, Any]] = {}
    left, faults = 0, []
    with progress("layers") as advance:
        for number, (name, weight) in enumerate(_weights(folder, found), 1):
            matrix = views[name].as_matrix(weight) if name in views else weight.flatten(1)
            if tuple(matrix.shape) != found[name].shape:
                shape, update = list(matrix.shape), list(found[name].shape)
                faults.append(f"{name}: the update is {update}, the weight {shape}")
            elif min(matrix.shape) > widest:
                left += 1
            else:
                rows[name] = {"name": name, **against(matrix, found[name]).as_dict()}
            advance(number, len(found), name)
    if faults:
        raise DamagedAdapter("the adapter does not fit the base", where=folder, faults=faults)
    if left:
        note(f"{left} weights are wider than --widest {widest} and were not decomposed")
    return [rows[name] for name in found if name in rows]


def _weights(folder: Path, found: Mapping[str, Factors]) -> Iterator[tuple[str, Tensor]]:
    """Each adapted weight of a base's checkpoint, one in memory at a time."""
    stored, packed = Checkpoint(folder), 0
    for key in stored:
        owner = key.removesuffix(".weight")
        name = next((name for name in found if _same_module(name, owner)), None)
        if name is None or not key.endswith(".weight"):
            continue
        if stored.floating(key):
            yield name, stored.read(key)
        else:
            packed += 1
    if packed:
        note(f"{packed} weights of the base are stored quantised: they are not looked at")


def _same_module(name: str, owner: str) -> bool:
    """Whether two paths name one module: a base saved without its head lacks a prefix."""
    return owner in (name, name.partition(".")[2]) or name == owner.partition(".")[2]
