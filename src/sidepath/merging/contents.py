"""What a merged folder holds: tensors by name on disk, in the files of the base (floor 5)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidepath.errors import SidepathNotice
from sidepath.injection.registry import require_registry
from sidepath.merging.folded import Folded, first_names
from sidepath.merging.mapped import Mapped
from sidepath.merging.names import as_on_disk, names_on_disk, stored_once, untie
from sidepath.merging.proof import Loaded
from sidepath.merging.writing import Entry, write_file, write_index
from sidepath.store.fingerprint import INDEX, WHOLE, checkpoint_files
from sidepath.store.peft_format import base_state
from sidepath.store.tensors import read_header, read_json

_HELD_WHOLE = (
    "{}: its folder holds other tensors than the model ({} puts some together while it loads): the "
    "merged model is held in memory whole"
)


def write_tensors(
    loaded: Loaded,
    cls: Any,
    name: str,
    stored: Mapping[str, torch.dtype],
    base: Path,
    folder: Path,
    carried: Sequence[Entry],
    written: Callable[[Path], object],
) -> None:
    """Write the model with its adapter `name` folded in as safetensors: files as those of `base`.

    `cls` is the model's class; `stored` gives the dtype of each tensor by name. Tied tensors that
    the adapter parts are parted in the model too. What the adapter leaves as it is and no other
    dtype is wanted for is copied from the base's files; the rest is made one module at a time.
    `carried` are tensors of the base's that no model has. `written` is called with each file that
    is whole.

    Errors: `OSError`; `TiedWeights`, `MergeError`.
    """
    model = loaded.model
    folded = Folded(model, name, stored)
    names = stored_once(model, base_state(model))
    parted = untie(model, cls, require_registry(model).adapter(name), folded.touched)
    names += [full for full in parted if full not in names]
    on_disk = names_on_disk(model, names)
    if on_disk is None:
        warnings.warn(_HELD_WHOLE.format(base, cls.__name__), SidepathNotice, stacklevel=4)
        first = first_names(model)
        whole = as_on_disk(model, {full: folded.tensor(first[full]) for full in names})
        entries = [_whole_entry(full, tensor) for full, tensor in whole.items()]
    else:
        entries = _entries(loaded, folded, on_disk, stored)
    files = _in_files([*entries, *carried], checkpoint_files(base))
    for file, own in files.items():
        write_file(folder / file, own)
        written(folder / file)
    _write_index(base, folder, files)


def _write_index(base: Path, folder: Path, files: Mapping[str, list[Entry]]) -> None:
    """The list of the files, where the base has one."""
    if (base / INDEX).is_file() and not (base / WHOLE).is_file():
        earlier = read_json(base / INDEX).get("metadata") or {}
        write_index(folder / INDEX, earlier, files)


def _whole_entry(full: str, tensor: Tensor) -> Entry:
    return Entry(full, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def _entries(
    loaded: Loaded, folded: Folded, on_disk: Mapping[str, str], stored: Mapping[str, torch.dtype]
) -> list[Entry]:
    model, mapped = loaded
    state, first = base_state(model), first_names(model)
    entries = []
    for full, written in on_disk.items():
        tensor, own = state[full], first[full]
        as_it_is = own not in folded.touched and tensor.dtype == stored[full]
        place = mapped.place(tensor) if as_it_is else None
        make = partial(_made, folded, own, mapped, tensor)
        shape = folded.longer.get(own, tuple(tensor.shape))
        entries.append(Entry(written, stored[full], shape, make, place))
    return entries


def _made(folded: Folded, full: str, mapped: Mapped, base: Tensor) -> Tensor:
    """A merged tensor; the pages of the base's that it was made of are let go."""
    tensor = folded.tensor(full)
    mapped.release(base)
    return tensor


def _in_files(entries: Sequence[Entry], files: Sequence[Path]) -> dict[str, list[Entry]]:
    """The entries in the base's files and their order; what the base has not stands in the last."""
    at: dict[str, tuple[str, int]] = {}
    for path in files:
        for name, info in read_header(path, floating_only=False).items():
            at[name] = (path.name, info.start)
    last = (files[-1].name, 2**63)
    ordered = sorted(entries, key=lambda entry: _where(entry, at, last)[1])
    found: dict[str, list[Entry]] = {path.name: [] for path in files}
    for entry in ordered:
        found[_where(entry, at, last)[0]].append(entry)
    return {name: own for name, own in found.items() if own}


def _where(
    entry: Entry, at: Mapping[str, tuple[str, int]], last: tuple[str, int]
) -> tuple[str, int]:
    """The file and the byte of the base's tensor of that name: a base without its head has shorter
    ones.
    """
    if entry.place is not None:
        return entry.place.path.name, entry.place.start
    return at.get(entry.name) or at.get(entry.name.partition(".")[2]) or last
