"""The verb inspect: what each update of an adapter is made of (floor 7)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sidepath.analyse import Factors, factors_of, similarity, spectrum
from sidepath.cli.bases import base_folder
from sidepath.cli.output import Report, Table, cell, note
from sidepath.cli.runs import InspectRun
from sidepath.cli.surface import Call
from sidepath.errors import ConfigError, StoreError, WrongBase
from sidepath.store import manifest as manifests
from sidepath.store.fingerprint import checkpoint_files, fingerprint, same_base
from sidepath.store.loading import load_tensors
from sidepath.store.tensors import FLOATING, read_header

LARGEST_SHOWN = 4
"""Singular values a row of the table shows; the document holds all."""


def inspect(call: Call) -> Report:
    """Singular values, effective rank and norm of each update, or what two adapters share."""
    run = call.settings.build("inspect", InspectRun)
    found = factors_of(Path(call.places[0]))
    if len(call.places) == 1:
        if run.base is not None:
            _require_base(Path(call.places[0]), base_folder(run.base))
        return _layers(found, run.base)
    if run.base is not None:
        raise ConfigError("--base goes with one adapter; two are compared with each other")
    return _similarity(found, factors_of(Path(call.places[1])))


def _layers(found: dict[str, Factors], base: str | None) -> Report:
    norms = {} if base is None else _norms(base_folder(base), found)
    layers: list[dict[str, Any]] = []
    for name, factors in found.items():
        result = spectrum(factors)
        relative = result.norm / norms[name] if norms.get(name) else None
        layers.append({"name": name, "r": factors.r, **result.as_dict(), "relative_norm": relative})
    columns = ["layer", "r", "largest singular values", "effective rank", "norm", "relative norm"]
    rows = [
        [
            layer["name"],
            layer["r"],
            " ".join(cell(value) for value in layer["singular_values"][:LARGEST_SHOWN]),
            layer["effective_rank"],
            layer["norm"],
            layer["relative_norm"],
        ]
        for layer in layers
    ]
    return Report({"layers": layers}, [Table("", columns, rows)])


def _require_base(adapter: Path, base: Path) -> None:
    """Raise `WrongBase` unless the base is the one that the adapter's manifest names."""
    if not (adapter / manifests.NAME).exists():
        note(f"note: {adapter}: no {manifests.NAME}: its base could not be verified")
        return
    manifest, _ = manifests.read_manifest(adapter)
    assert manifest is not None, "factors_of has read it"
    faults = same_base(manifest.base, fingerprint(base))
    if faults:
        raise WrongBase("the adapter was made for another base", where=base, faults=faults)


def _norms(folder: Path, found: dict[str, Factors]) -> dict[str, float]:
    """The Frobenius norm of each adapted weight that the base's checkpoint holds."""
    norms: dict[str, float] = {}
    packed = 0
    for path in checkpoint_files(folder):
        for key, info in read_header(path, floating_only=False).items():
            owner = key.removesuffix(".weight")
            name = next((name for name in found if _same_module(name, owner)), None)
            if name is None or not key.endswith(".weight"):
                continue
            if info.dtype not in FLOATING:
                packed += 1
            else:
                (tensor,) = load_tensors(path, {key: info}).values()
                norms[name] = float(tensor.double().norm())
    if packed:
        note(f"{packed} weights of the base are stored quantised: no norm relative to them")
    return norms


def _same_module(name: str, owner: str) -> bool:
    """Whether two paths name one module: a base saved without its head lacks a prefix."""
    return owner in (name, name.partition(".")[2]) or name == owner.partition(".")[2]


def _similarity(first: dict[str, Factors], second: dict[str, Factors]) -> Report:
    shared = [name for name in first if name in second]
    if not shared:
        raise StoreError(
            "the two adapters update no layer in common",
            found=f"{', '.join(list(first)[:3])} and {', '.join(list(second)[:3])}",
        )
    compared = [{"name": name, "phi": similarity(first[name], second[name])} for name in shared]
    rows = [[entry["name"], entry["phi"][0][0], entry["phi"][-1][-1]] for entry in compared]
    columns = ["layer", "first directions", "whole spaces"]
    return Report({"similarity": compared}, [Table("phi, 0 to 1", columns, rows)])
