"""`sidepath.json`: what an adapter's folder holds, of which base, and how it came to be (floor 4).

The manifest lists every other file with its size and SHA-256, and ends with the SHA-256 of its
own bytes up to that line: no bit of the folder's files can change unseen. It is a checksum, not
a signature: who can write the folder can write another one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from sidepath.config import as_dict, build
from sidepath.errors import ConfigError, DamagedAdapter, StoreError
from sidepath.methods import METHODS
from sidepath.methods.base import Method, Site, SiteKind
from sidepath.methods.lora import LoRA
from sidepath.store.fingerprint import Fingerprint
from sidepath.store.folder import sha256_file
from sidepath.store.peft_format import CONFIG, WEIGHTS
from sidepath.store.tensors import TensorInfo, file_inside, small_file, strict_json, there

NAME = "sidepath.json"
FORMAT = 1
_LAST = b'  "digest": "'
_END = b'"\n}\n'
_FIELDS = ("format", "method", "config", "sites", "base", "tensors", "files", "record")


@dataclass(frozen=True)
class Manifest:
    """The contents of a `sidepath.json`."""

    config: Method
    sites: tuple[Site, ...]
    base_name: str | None
    model_class: str
    """The class the base was loaded as, for instance `LlamaForCausalLM`."""
    labels: list[str] | None
    """A classifier's label names, in the order of its outputs."""
    base: Fingerprint
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """Size in bytes and SHA-256 by file name."""
    base_revision: str | None = None
    """The base's commit, where it came from the hub."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """How the adapter came to be: data digest, seed, versions, metrics, command."""


def is_ours(folder: Path) -> bool:
    """Whether a folder has a manifest; a link that leads nowhere counts, and is then refused."""
    return there(folder / NAME)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `sidepath.json` for the files that lie in `folder` now (`manifest.files` is unused)."""
    files = {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": sha256_file(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    values = {**as_values(manifest), "files": files}
    try:
        text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"the adapter's record cannot be written as JSON: {error}",
            hint="give numbers, texts, lists and tables only; no NaN",
        ) from error
    head = text.removesuffix("\n}").encode() + b",\n" + _LAST
    (folder / NAME).write_bytes(head + hashlib.sha256(head).hexdigest().encode() + _END)


def as_values(manifest: Manifest) -> dict[str, Any]:
    """A manifest's plain values for JSON, without its files; `from_values` is the inverse."""
    return {
        "format": FORMAT,
        "method": manifest.config.method,
        "config": as_dict(manifest.config),
        "sites": [_site_values(site) for site in manifest.sites],
        "base": {
            "name": manifest.base_name,
            "revision": manifest.base_revision,
            "class": manifest.model_class,
            "labels": manifest.labels,
            "fingerprint": manifest.base.as_dict(),
        },
        "tensors": {key: [dtype, list(shape)] for key, (dtype, shape) in manifest.tensors.items()},
        "record": dict(manifest.record),
    }


def from_values(
    values: Any, files: Mapping[str, tuple[int, str]]
) -> tuple[Manifest | None, list[str]]:
    """A manifest from its plain values, with all faults; None when it cannot be understood."""
    try:
        _refuse_other_form(values)
        return _understood(values, files), []
    except ConfigError as error:
        return None, [f"{NAME}: {error}"]
    except DamagedAdapter as error:
        return None, [f"{NAME}: {fault}" for fault in error.faults or [error.what]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return None, [f"{NAME}: malformed: {error}"]


Files = Mapping[str, tuple[int, str]]
"""Sizes in bytes and SHA-256 digests by file name."""


def digests(folder: Path, files: Files) -> list[str]:
    """The faults of a folder's files against their sizes and digests: every byte is read."""
    return [fault for name, entry in files.items() for fault in check_file(folder, name, *entry)]


def sizes(folder: Path, files: Files) -> list[str]:
    """The faults of a folder's files against their sizes: none is opened."""
    return [
        fault for name, (size, _) in files.items() for fault in check_file(folder, name, size, None)
    ]


def all_but(later: str) -> Callable[[Path, Files], list[str]]:
    """`digests`, but of the file `later` the size alone: its digest is taken of the bytes loaded.

    Where something else is amiss nothing will be loaded, and it is checked like the others.
    """

    def check(folder: Path, files: Files) -> list[str]:
        first = {name: entry for name, entry in files.items() if name != later}
        last = {name: entry for name, entry in files.items() if name == later}
        faulty = digests(folder, first) or sizes(folder, last)
        return digests(folder, files) if faulty else []

    return check


def read_manifest(
    folder: Path, *, check: Callable[[Path, Files], list[str]] = digests
) -> tuple[Manifest | None, list[str]]:
    """Read and check `sidepath.json` and, by `check`, the files it lists; all faults together.

    None stands for a manifest that cannot be understood. Nothing is loaded.
    """
    try:
        data = small_file(file_inside(folder, NAME))
    except ValueError as error:
        return None, [f"{NAME}: {error}"]
    if len(data) < 64 + len(_END):
        return None, [f"{NAME}: truncated"]
    head, digest = data[: -64 - len(_END)], data[-64 - len(_END) : -len(_END)]
    if hashlib.sha256(head).hexdigest().encode() != digest or not data.endswith(_END):
        return None, [f"{NAME}: its bytes are not those that were saved"]
    try:
        values = strict_json(data)
        _refuse_other_form(values)
        entries = values["files"].items()
        files = {name: (entry["size"], entry["sha256"]) for name, entry in entries}
        faults = check(folder, files)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return None, [f"{NAME}: malformed: {error}"]
    # The settings of a folder whose files have changed are not worth a look.
    if faults:
        return None, faults
    manifest, faults = from_values(values, files)
    return manifest, faults + ([] if manifest is None else _unlisted(manifest))


def trusted_manifest(folder: Path) -> Manifest:
    """The manifest of a folder whose files are those that were saved.

    Errors: `DamagedAdapter` with all faults.
    """
    manifest, faults = read_manifest(folder)
    if manifest is None or faults:
        raise DamagedAdapter("the adapter cannot be trusted", where=folder, faults=faults)
    return manifest


def _unlisted(manifest: Manifest) -> list[str]:
    """The files of an adapter that its manifest does not list: nobody knows their digests."""
    needed = (WEIGHTS, CONFIG) if isinstance(manifest.config, LoRA) else (WEIGHTS,)
    return [f"{name}: not listed in {NAME}" for name in needed if name not in manifest.files]


def _refuse_other_form(values: Any) -> None:
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    if values.get("format") != FORMAT:
        raise ValueError(f"format {values.get('format')!r}, this version reads {FORMAT}")


def check_file(folder: Path, name: str, size: int, sha256: str | None) -> list[str]:
    """The faults of one file against its size and, unless None, its digest."""
    try:
        path = file_inside(folder, name)
        found = os.path.getsize(path)
        if found != size:
            return [f"{name}: {found} bytes, expected {size}"]
        changed = sha256 is not None and sha256_file(path) != sha256
    except DamagedAdapter as error:
        return [f"{name}: {error.what}"]
    except OSError as error:
        return [f"{name}: {error.strerror}"]
    return [f"{name}: its bytes are not those that were saved"] if changed else []


def _understood(values: Mapping[str, Any], files: Files) -> Manifest:
    unknown = set(values) - {*_FIELDS, "digest"}
    if unknown:
        raise ValueError(f"unknown field {', '.join(sorted(unknown))}")
    method, base = values["method"], values["base"]
    if method not in METHODS:
        raise ValueError(f"method {method!r}, expected one of {', '.join(METHODS)}")
    if not isinstance(values["record"], dict):
        raise ValueError("record is not a table")
    name, labels = base["name"], base["labels"]
    revision = base.get("revision")  # folders of the first version have none
    texts = [base["class"], *(one for one in (name, revision) if one is not None), *(labels or [])]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("the base's name, revision, class and labels are not texts")
    return Manifest(
        config=build(METHODS[method], values["config"]),
        sites=tuple(_site(entry) for entry in values["sites"]),
        base_name=name,
        model_class=base["class"],
        labels=labels,
        base=Fingerprint.from_dict(base["fingerprint"]),
        tensors={key: (dtype, tuple(shape)) for key, (dtype, shape) in values["tensors"].items()},
        files=files,
        base_revision=revision,
        record=values["record"],
    )


def _site_values(site: Site) -> dict[str, Any]:
    values = {"path": site.path, "kind": site.kind, "pattern": site.pattern}
    return values | ({"parts": [list(part) for part in site.parts]} if site.parts else {})


def _site(entry: Mapping[str, Any]) -> Site:
    path, kind, pattern = entry["path"], entry["kind"], entry["pattern"]
    parts = tuple((start, stop) for start, stop in entry.get("parts", ()))
    texts = isinstance(path, str) and isinstance(pattern, str)
    whole = all(type(number) is int for part in parts for number in part)
    if not texts or not whole or kind not in get_args(SiteKind):
        raise ValueError(f"site {entry!r}")
    return Site(path, kind, parts, pattern)


def check_tensors(manifest: Manifest, header: Mapping[str, TensorInfo]) -> list[str]:
    """Faults of a file's header against the manifest's keys, shapes and dtypes."""
    found = {key: (info.dtype, info.shape) for key, info in header.items()}
    if found == manifest.tensors:
        return []
    keys = sorted({*found, *manifest.tensors})
    return [
        f"{key}: {found.get(key, 'missing')}, expected {manifest.tensors.get(key, 'nothing')}"
        for key in keys
        if found.get(key) != manifest.tensors.get(key)
    ]
