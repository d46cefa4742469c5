"""An adapter's folder, uploaded to the hub as one commit, and looked at again there (floor 4)."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidepath.errors import ConfigError, DamagedAdapter, HubError, StoreError
from sidepath.store import manifest as manifests
from sidepath.store.card import CARD, LICENCE, PARITY, model_card
from sidepath.store.folder import sha256_file
from sidepath.store.hub import ADAPTER, PREFIX, HubPlace, is_hub, name_of, parse_place, reaching
from sidepath.store.manifest import Manifest, check_tensors, read_manifest, write_manifest
from sidepath.store.parity import PARITY as MEASURED
from sidepath.store.parity import read_parity
from sidepath.store.peft_format import WEIGHTS
from sidepath.store.tensors import file_inside, read_header

MAIN = "main"
_AGAIN = "see that the hub can be reached, then push again; the folder here is as it was"
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")


@dataclass(frozen=True)
class Pushed:
    """What the hub holds now."""

    place: HubPlace
    """The repository at the new commit."""
    url: str
    """The commit's page."""
    files: Mapping[str, int]
    """Sizes in bytes of the files that were sent, by name."""


def push(
    folder: Path,
    target: str,
    *,
    private: bool = False,
    message: str | None = None,
    licence: str | None = None,
    parity: Path | None = None,
) -> Pushed:
    """Upload an adapter's folder to `hub:OWNER/NAME[@BRANCH]`, with a model card, in one commit.

    Repository and branch are made where they are missing (`private`: such a new one is seen by its
    owner alone). The card tells base, metrics, data digest and, where they are given, the `licence`
    (an identifier of the hub's, such as apache-2.0) and the measured `parity` (the `parity.json`
    of a merge of this adapter alone). Both go into the uploaded manifest as well. `folder` is not
    changed. Files of the repository that the adapter does not have stay.

    Before anything is sent the folder is copied and the copy checked, digest by digest; afterwards
    the hub is asked for what it holds, and every file is compared.

    Errors: `DamagedAdapter` for a folder that is not what was saved, `StoreError` for one that
    holds other files or is none of ours, `ConfigError` for an impossible licence; `HubError`.
    """
    place = _target(target)
    manifest = _enriched(_verified(folder), licence, parity)
    said = message or f"Adapter {name_of(folder)}, {manifest.config.method}, by sidepath"
    with tempfile.TemporaryDirectory(prefix="sidepath-push-") as temporary:
        staged = Path(temporary, place.name.partition("/")[2])
        staged.mkdir()
        _stage(folder, staged, manifest, place)
        files = {path.name: path.stat().st_size for path in sorted(staged.iterdir())}
        held, url = _sent(place, staged, private, said)
    return Pushed(held, url, files)


def _target(target: str) -> HubPlace:
    if not is_hub(target):
        raise ConfigError(
            "an adapter is pushed to the hub", found=target, expected=f"{PREFIX}OWNER/NAME[@BRANCH]"
        )
    return parse_place(target)


def _verified(folder: Path) -> Manifest:
    """The manifest of a folder that holds what was saved and nothing else."""
    if not folder.is_dir():
        raise StoreError("there is no such adapter folder", where=folder)
    if not manifests.is_ours(folder):
        raise StoreError(
            f"the folder has no {manifests.NAME}: nothing says what it should hold",
            where=folder,
            hint="load it onto its base and save it: the saved folder can be pushed",
        )
    manifest, faults = read_manifest(folder)
    if manifest is not None:
        faults += check_tensors(manifest, read_header(file_inside(folder, WEIGHTS)))
    if manifest is None or faults:
        raise DamagedAdapter(
            "the adapter cannot be trusted; nothing was sent", where=folder, faults=faults
        )
    known = {manifests.NAME, *manifest.files}
    inside = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    foreign = sorted(inside - known) + sorted(name for name in known if not ADAPTER.takes(name))
    if foreign:
        raise StoreError(
            "the folder holds files that are not an adapter's; nothing was sent",
            where=folder,
            found=", ".join(foreign[:8]),
            expected=", ".join(ADAPTER.files),
            hint="move them elsewhere",
        )
    return manifest


def _enriched(manifest: Manifest, licence: str | None, parity: Path | None) -> Manifest:
    """The manifest with what is known only when the adapter is pushed."""
    record = dict(manifest.record)
    if licence is not None:
        if not _LICENCE.fullmatch(licence):
            raise ConfigError("no licence identifier", found=licence, expected="as in apache-2.0")
        record[LICENCE] = licence
    if parity is not None:
        record[PARITY] = _parity_of(parity, manifest)
    return dataclasses.replace(manifest, record=record)


def _parity_of(place: Path, manifest: Manifest) -> dict[str, Any]:
    """What a merge of this adapter measured."""
    merged, parity = read_parity(place / MEASURED if place.is_dir() else place)
    if set(merged) != {manifest.files[WEIGHTS][1]}:
        raise StoreError(
            "the parity was measured for another adapter, or for several",
            where=place,
            found=", ".join(merged.values()),
        )
    if parity is None:
        raise StoreError("the merge skipped measuring its parity", where=place)
    return parity.as_dict()


def _stage(folder: Path, staged: Path, manifest: Manifest, place: HubPlace) -> None:
    """Copy the files and write card and manifest anew; what was copied is what was verified."""
    changed = []
    for name, (_, digest) in manifest.files.items():
        if name != CARD:
            shutil.copyfile(file_inside(folder, name), staged / name)
            if sha256_file(staged / name) != digest:
                changed.append(f"{name}: changed meanwhile")
    if changed:
        raise DamagedAdapter("the adapter changed while it was read", where=folder, faults=changed)
    numbers = sum(math.prod(shape) for _, shape in manifest.tensors.values())
    card = model_card(manifest, staged.name, numbers, str(place))
    (staged / CARD).write_text(card, encoding="utf-8")
    write_manifest(staged, manifest)


def _sent(place: HubPlace, staged: Path, private: bool, message: str) -> tuple[HubPlace, str]:
    """Send the staged files and look at them again there; the commit, and its page."""
    with reaching(place, "written to", _AGAIN):
        commit, url = _send(place, staged, private, message)
        held = HubPlace(place.name, commit)
        faults = _differing(held, staged)
    if faults:
        raise HubError(
            "the hub does not hold what was sent",
            where=held,
            faults=faults,
            hint="push again; the folder here is as it was",
        )
    return held, url


def _send(place: HubPlace, staged: Path, private: bool, message: str) -> tuple[str, str]:
    """Commit the staged files; returns the commit and its page."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    branch = place.revision or MAIN
    api.create_repo(place.name, private=private or None, exist_ok=True)
    if branch != MAIN:
        api.create_branch(place.name, branch=branch, exist_ok=True)
    added = [CommitOperationAdd(path.name, str(path)) for path in sorted(staged.iterdir())]
    found = api.create_commit(place.name, added, commit_message=message, revision=branch)
    return str(found.oid), str(found.commit_url)


def _differing(place: HubPlace, staged: Path) -> list[str]:
    """The files that the hub does not hold as they are here: by git's or git LFS's digest."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    tree = HfApi().list_repo_tree(place.name, revision=place.revision)
    held = {
        entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id
        for entry in tree
        if isinstance(entry, RepoFile)
    }
    return [
        f"{path.name}: {'another content' if path.name in held else 'missing'}"
        for path in sorted(staged.iterdir())
        if held.get(path.name) not in (sha256_file(path), _blob_id(path.read_bytes()))
    ]


def _blob_id(body: bytes) -> str:
    """Git's name for a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body, usedforsecurity=False).hexdigest()
