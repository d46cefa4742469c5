"""What an adapter is, on its way through a format that cannot say all of it (floor 5).

Most formats hold fewer words than ours: one rank and one scale, no base, no data type. They also
have room for text of anybody's. There the passport travels: the adapter's settings, the data type
and shape of each tensor, and the manifest with the base's fingerprint. Whoever reads the file
back has the adapter as it was, to the bit; other tools do not look at it.

The passport says what was written, so that the file is held against it: a file that was changed
on the way no longer fits, and is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from sidepath.convert.portable import Portable, Update
from sidepath.errors import DamagedAdapter
from sidepath.methods.lora import LoRA
from sidepath.store.manifest import Manifest, as_values, from_values
from sidepath.store.peft_config import read_settings
from sidepath.store.peft_format import MAGNITUDE, PAIRS, PREFIX
from sidepath.store.tensors import DTYPE_NAMES, FLOATING, strict_json

KEY = "sidepath"
"""Where it stands: in the metadata of a safetensors file, or among the keys of a settings file."""
_FIELDS = {"adapter_config", "tensors", "manifest"}
_LONGEST = 512
_SAME = 1e-6
"""Scales that differ by less, relatively, are one number that was stored in float32."""

Passport = Mapping[str, Any]


def passport_of(portable: Portable) -> dict[str, Any]:
    """The passport of an adapter, as plain values for JSON."""
    manifest = portable.manifest
    return {
        "adapter_config": dict(portable.values),
        "tensors": {
            key: [DTYPE_NAMES[tensor.dtype], list(tensor.shape)]
            for key, tensor in portable.tensors.items()
        },
        "manifest": None if manifest is None else as_values(manifest),
    }


def as_text(portable: Portable) -> str:
    """The passport as one line of JSON."""
    return json.dumps(passport_of(portable), separators=(",", ":"), allow_nan=False)


def parse(text: str, where: str | PathLike[str]) -> Passport:
    """A passport from its text. Errors: `DamagedAdapter`."""
    try:
        return checked(strict_json(text.encode()), where)
    except ValueError as error:
        raise DamagedAdapter(
            "sidepath's record in the file is not JSON", where=where, found=error
        ) from error


def checked(values: Any, where: str | PathLike[str]) -> Passport:
    """A passport whose form is right: its settings, and a data type and shape for each tensor.

    Errors: `DamagedAdapter` with all faults.
    """
    faults = []
    if not isinstance(values, dict) or values.keys() != _FIELDS:
        faults = [f"expected a table of {', '.join(sorted(_FIELDS))}"]
    else:
        faults += read_settings(values["adapter_config"])[1]
        faults += _faults_of(values["tensors"])
    if faults:
        raise DamagedAdapter(
            "sidepath's record in the file is malformed", where=where, faults=faults
        )
    found: Passport = values
    return found


def _faults_of(entries: Any) -> list[str]:
    """What is wrong with the table of tensors: names, data types, shapes, halves of updates."""
    if not isinstance(entries, dict) or not all(map(_is_entry, entries.values())):
        return ["tensors: expected a data type and a shape for each"]
    faults = [
        f"{key[:80]!r}: expected a module's name in ASCII, at most {_LONGEST} characters"
        for key in entries
        if not key.isascii() or len(key) > _LONGEST
    ]
    for endings in PAIRS:
        for key in [key for key in entries if key.endswith(endings)]:
            start = key.removesuffix(endings[0]).removesuffix(endings[1])
            if len(entries[key][1]) < 2:
                faults.append(f"{key}: shape {entries[key][1]}, expected a matrix")
            faults += [f"{start}{end}: missing" for end in endings if start + end not in entries]
    return faults


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, list) or len(entry) != 2 or entry[0] not in list(FLOATING):
        return False
    shape = entry[1]
    return isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)


def paths_of(passport: Passport) -> dict[str, bool]:
    """The paths of the updates that it tells of, and whether each is an embedding's."""
    return {
        key.removeprefix(PREFIX).removesuffix(endings[0]): endings is PAIRS[1]
        for endings in PAIRS
        for key in passport["tensors"]
        if key.endswith(endings[0])
    }


def restored(
    passport: Passport,
    found: Mapping[str, Update],
    where: str | PathLike[str],
    others: Mapping[str, Tensor] | None = None,
) -> Portable:
    """The adapter that the passport tells of, from the updates that a file holds, and `others` of
    its tensors by PEFT's keys.

    A rank that was padded is cut again, a factor that was folded into B taken out again (exactly
    where it is a power of two), and each tensor gets its data type back.
    Errors: `DamagedAdapter` with all faults where the file is not what was written.
    """
    paths = paths_of(passport)
    faults = [f"{path}: missing" for path in paths if path not in found]
    faults += [f"{path}: unexpected" for path in found if path not in paths]
    tensors = _tensors(passport, found, faults)
    for key, tensor in (others or {}).items():
        try:
            tensors[key] = _as_it_was("it", tensor, *passport["tensors"][key])
        except ValueError as error:
            faults.append(f"{key}: {error}")
    lost = [key for key in passport["tensors"] if key not in tensors and not faults]
    faults += [f"{key}: missing" for key in lost]
    manifest = manifest_of(passport, faults)
    if faults:
        raise DamagedAdapter(
            "the file is not the one that was converted",
            where=where,
            faults=faults,
            hint="convert the adapter again from where it came from",
        )
    ordered = {key: tensors[key] for key in passport["tensors"]}
    portable = Portable(ordered, passport["adapter_config"], manifest)
    portable.updates()
    return portable


def _tensors(
    passport: Passport, found: Mapping[str, Update], faults: list[str]
) -> dict[str, Tensor]:
    """The tensors of all updates as they were, by PEFT's keys."""
    settings = Portable({}, passport["adapter_config"]).settings
    tensors: dict[str, Tensor] = {}
    for path, embedding in paths_of(passport).items():
        if path not in found:
            continue
        one = found[path]
        endings = zip("ABm", (*PAIRS[embedding], MAGNITUDE), strict=True)
        keys = {name: PREFIX + path + ending for name, ending in endings}
        wanted = {name: passport["tensors"].get(key) for name, key in keys.items()}
        times = one.scaling / settings.scaling_of(path)
        try:
            parts = _restored(one, wanted, 1.0 if abs(times - 1) < _SAME else times)
        except ValueError as error:
            faults.append(f"{path}: {error}")
            continue
        tensors |= {keys[name]: tensor for name, tensor in parts.items()}
    return tensors


def manifest_of(passport: Passport, faults: list[str]) -> Manifest | None:
    """The manifest that travels in a passport, if any; what is wrong with it goes into `faults`."""
    if passport["manifest"] is None:
        return None
    manifest, more = from_values(passport["manifest"], {})
    faults += more
    if manifest is not None:
        entries = {key: (one[0], tuple(one[1])) for key, one in passport["tensors"].items()}
        if manifest.tensors != entries:
            faults.append("the manifest names other tensors")
        if not isinstance(manifest.config, LoRA):
            faults.append(f"the manifest is of the method {manifest.config.method}")
    return manifest


def _restored(one: Update, wanted: Mapping[str, Any], times: float) -> dict[str, Tensor]:
    if (one.magnitude is None) != (wanted["m"] is None):
        raise ValueError("DoRA's magnitude is missing or unexpected")
    r = wanted["A"][1][0]
    A, B = one.A, one.B
    if len(A) > r and A.dim() == 2:
        if torch.count_nonzero(B[:, r:]) or torch.count_nonzero(A[r:]):
            raise ValueError(f"rank {len(A)}, expected {r}, and zeros beyond it")
        A, B = A[:r], B[:, :r]
    if times != 1.0:
        B = (B.double() * times).to(FLOATING[wanted["B"][0]])
        if not torch.isfinite(B).all():
            raise ValueError(f"B times {times:g} is not finite as {wanted['B'][0]}")
    parts = {"A": A, "B": B}
    if one.magnitude is not None:
        parts["m"] = one.magnitude
    return {name: _as_it_was(name, tensor, *wanted[name]) for name, tensor in parts.items()}


def _as_it_was(name: str, tensor: Tensor, dtype: str, shape: list[int]) -> Tensor:
    if list(tensor.shape) != shape:
        raise ValueError(f"{name} {list(tensor.shape)}, expected {shape}")
    cast = tensor.to(FLOATING[dtype])
    if not torch.equal(cast.to(tensor.dtype), tensor):
        raise ValueError(f"{name} holds numbers that are not {dtype}, as what was converted")
    return cast
