"""Checkpoints: folders that a run resumes from, to the same bits.

    <folder>/step-00000012/tensors.safetensors    trained tensors, optimiser, best state, history
    <folder>/step-00000012/checkpoint.json        everything else, with the SHA-256 of both

Each is published whole (see `store.folder`), and older ones go only after a new one is safe:
renamed aside before they are deleted, so that a kill leaves no half of one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from sidepath.errors import ResumeError, SidepathError
from sidepath.store.aside import clear_leftovers, discard
from sidepath.store.folder import publish, sha256_file
from sidepath.store.tensors import file_inside, read_header, read_json

FORMAT = 2
_TENSORS, _STATE = "tensors.safetensors", "checkpoint.json"
_NAME = re.compile(r"step-(\d{8,})")
_KEYS = {"format", "step", "progress", "identity", "files"}
_UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError),
    RuntimeError,  # RecursionError; what torch raises for a file that went away
    *(SafetensorError, SidepathError),
)
_ATTEMPTS = 100
"""Readings of a folder that another process keeps changing."""
_MAY_CHANGE = ("checkpoint_every", "keep_checkpoints", "workers")
"""Settings that do not change what a run computes."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step` steps."""

    step: int
    tensors: dict[str, Tensor]
    """By "model/", "optimizer/<slot>/", "best/" and "watch/" + name."""
    progress: dict[str, Any]
    """Best loss, evaluations without improvement, place in the epoch; plain values."""
    identity: dict[str, Any]
    """What must be equal in the run that resumes: config, data, adapter, base; plain values."""


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return folder / f"step-{step:08d}"


def save(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Publish a checkpoint below `folder` and drop all but the newest `keep`; its path.

    A checkpoint of the same step is replaced. One of a later step was damaged when the run went
    on from an older one: it stays until the run gets there, and does not count.

    Errors: `WriteFailed`; nothing half-written is left, and the older checkpoints stand. What
    cannot be dropped stays until a later save.
    """
    from safetensors.torch import save_file

    target = path_of(folder, checkpoint.step)
    with publish(target, replace=_only_ours) as temporary:
        tensors = {name: _stored(tensor) for name, tensor in checkpoint.tensors.items()}
        save_file(tensors, temporary / _TENSORS)
        body = {
            "format": FORMAT,
            "step": checkpoint.step,
            "progress": checkpoint.progress,
            "identity": checkpoint.identity,
            "files": {_TENSORS: sha256_file(temporary / _TENSORS)},
        }
        text = json.dumps({**body, "digest": _digest(body)}, indent=1)
        (temporary / _STATE).write_text(text, encoding="utf-8")
    prune(folder, checkpoint.step, keep=keep)
    return target


def prune(folder: Path, step: int, *, keep: int) -> None:
    """Drop all but the newest `keep` of the checkpoints up to `step`, and what killed saves left.

    What cannot be dropped stays until the next time.
    """
    with suppress(OSError):
        older = [path for path in _numbered(folder) if _number(path) < step]
        for path in older[: max(0, len(older) + 1 - keep)]:
            discard(path)
        clear_leftovers(folder, _NAME)


def _only_ours(folder: Path) -> bool:
    """A damaged checkpoint is replaced, a folder with other files is not."""
    return {path.name for path in folder.iterdir()} <= {_TENSORS, _STATE}


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _numbered(folder: Path) -> list[Path]:
    """The checkpoints below a folder, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_number)


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def require_none(folder: Path) -> None:
    """Raise a `ResumeError` when the folder holds checkpoints: a new run must not mix with them."""
    found = _numbered(folder)
    if found:
        raise ResumeError(
            "the folder holds checkpoints of an earlier run",
            where=folder,
            found=f"{len(found)}, the newest {found[-1].name}",
            hint="resume that run, or choose another folder",
        )


def latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and one notice for each newer one that is not.

    None when the folder holds no checkpoint: the run was stopped before its first. What killed
    saves left in the folder is cleared first.

    Raises:
        ResumeError: there are checkpoints, and every one is damaged.
    """
    if folder.is_dir():
        with suppress(OSError):
            clear_leftovers(folder, _NAME)
    for _ in range(_ATTEMPTS):
        before = _present(folder)
        found, faults = _newest_whole(folder)
        # Else another process saved or pruned meanwhile. And where one does, a folder that is
        # being listed may seem to hold neither the checkpoint that goes nor the one that comes.
        if before and _present(folder) == before:
            break
    if found is None and faults:
        raise ResumeError(
            "no checkpoint of the run can be trusted",
            where=folder,
            faults=faults,
            hint="delete the folder to start anew",
        )
    return found, [f"{fault}; an older one is used" for fault in faults]


def _present(folder: Path) -> dict[str, int]:
    """The inode of each checkpoint: it changes when one is replaced."""
    present = {}
    for path in _numbered(folder):
        with suppress(FileNotFoundError):
            present[path.name] = path.stat().st_ino
    return present


def _newest_whole(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    faults: list[str] = []
    for path in reversed(_numbered(folder)):
        try:
            return _read(path), faults
        except _UNREADABLE as error:
            faults.append(f"{path.name} is damaged ({_reason(error)})")
    return None, faults


def _reason(error: Exception) -> str:
    text = error.what if isinstance(error, SidepathError) else str(error)
    return next(iter(text.splitlines()), type(error).__name__)


def _read(path: Path) -> Checkpoint:
    from safetensors.torch import load_file

    body = read_json(file_inside(path, _STATE))
    if not isinstance(body, dict) or body.pop("digest", None) != _digest(body):
        raise ResumeError(f"{_STATE} does not have the digest it names")
    if body.get("format") != FORMAT:
        raise ResumeError(f"format {body.get('format')}, this version reads {FORMAT}")
    if missing := sorted(_KEYS - body.keys()):
        raise ResumeError(f"{_STATE} lacks {', '.join(missing)}")
    if body["step"] != _number(path):
        raise ResumeError(f"the folder's name does not fit the step in it, {body['step']}")
    if not all(isinstance(body[key], dict) for key in ("progress", "identity", "files")):
        raise ResumeError(f"{_STATE} is malformed")
    weights = file_inside(path, _TENSORS)
    read_header(weights, floating_only=False)
    # The bytes are proven to be ours before safetensors parses them.
    if sha256_file(weights) != body["files"][_TENSORS]:
        raise ResumeError(f"{_TENSORS} does not have the SHA-256 that {_STATE} names")
    tensors = load_file(weights)
    return Checkpoint(body["step"], tensors, body["progress"], body["identity"])


def require_same(found: Mapping[str, Any], expected: Mapping[str, Any], folder: Path) -> None:
    """Raise one `ResumeError` naming every setting that differs from the checkpoint's."""
    ours, theirs = _flat(expected), _flat(found)
    faults = [
        f"{name}: the checkpoint has {_short(theirs.get(name))}, this run {_short(ours.get(name))}"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name) and name.removeprefix("config.") not in _MAY_CHANGE
    ]
    if faults:
        raise ResumeError(
            "the checkpoint belongs to a run with other settings",
            where=folder,
            faults=faults,
            hint="resume with the settings of the run, or start anew in another folder",
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts with `prefix`, by the rest of the name."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
