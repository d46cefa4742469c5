"""How an adapter came to be, as its folder tells: record, plan, history, parity (floor 7)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sidepath.data.audit import told
from sidepath.errors import ConfigError, DamagedAdapter, StoreError
from sidepath.store import manifest as manifests
from sidepath.store.folder import sha256_file
from sidepath.store.manifest import Manifest
from sidepath.store.parity import PARITY, read_parity
from sidepath.store.peft_format import WEIGHTS
from sidepath.store.tensors import file_inside
from sidepath.training import history as histories

_MADE_SMALLER = ("truncated", "advised")
"""What the record says of an adapter that `inspect` wrote: its file is no longer the planned."""


def origins(place: Path, merged: str | None = None) -> dict[str, Any]:
    """What an adapter's folder tells of its training, for the document of `inspect`: `record`, and
    where there is one `history` (`history.json`), `planned` (predicted and measured bytes),
    `parity` (of the folder `merged`). Of a folder that is not ours, an empty record.

    Errors: `StoreError`, `DamagedAdapter`, `ConfigError` for files that cannot be read or trusted,
    or a merged folder that this adapter is not in.
    """
    found: dict[str, Any] = {"record": {}}
    if manifests.is_ours(place):
        manifest = manifests.trusted_manifest(place)
        found["record"] = manifest.record
        if histories.FILE in manifest.files:
            path = file_inside(place, histories.FILE)
            found["history"] = histories.read_history(path).as_dict()
        found["planned"] = _planned(place, manifest)
    if merged is not None:
        found["parity"] = _parity(Path(merged), place)
    return found


def audit_of(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The audit of the record, for people. Errors: `DamagedAdapter` for one that is malformed."""
    audit = document["record"].get("audit")
    if audit is None:
        return []
    try:
        return told(audit)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedAdapter(
            "the record's audit is malformed", where=document["adapter"], found=repr(error)
        ) from error


def _planned(place: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """Bytes that were predicted beside those that were measured, where both are known."""
    record = manifest.record
    rows = []
    try:
        memory = record.get("memory") or {}
        if memory.get("measured") is not None:
            rows.append(_row("memory at its peak", memory["predicted"], **_measured(memory)))
        size = record.get("adapter_bytes") or {}
        if size.get("predicted") and not any(name in record for name in _MADE_SMALLER):
            real = manifest.files[WEIGHTS][0]
            rows.append(_row("adapter's file", size["predicted"], real, "its size on disk"))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedAdapter(
            "the record's plan is malformed", where=place, found=repr(error)
        ) from error
    return rows


def _measured(memory: Mapping[str, Any]) -> dict[str, Any]:
    return {"measured": memory["measured"], "how": str(memory["how"])}


def _row(what: str, predicted: int, measured: int, how: str) -> dict[str, Any]:
    if type(predicted) is not int or type(measured) is not int:
        raise ValueError(f"{what}: {predicted!r} and {measured!r} are no bytes")
    return {"what": what, "predicted": predicted, "measured": measured, "how": how}


def _parity(folder: Path, place: Path) -> dict[str, Any]:
    """What the merged folder says of its parity, if this adapter is in it."""
    if not (folder / PARITY).is_file():
        raise StoreError("the folder was not made by sidepath merge", where=folder, expected=PARITY)
    merged, measured = read_parity(file_inside(folder, PARITY))
    if not place.is_dir() or sha256_file(place / WEIGHTS) not in merged:
        raise ConfigError(
            "--merged: this adapter is not in that folder",
            where=folder,
            found=", ".join(merged.values()),
        )
    return {"folder": folder.name, **({"skipped": True} if measured is None else vars(measured))}
