"""Is this the base that an adapter was made for? (floor 4)

A fingerprint holds, for each floating parameter of a base, its shape, its dtype and 16 of its
values at fixed positions. Two bases are the same when every recorded value could be the found
one seen through another dtype: each stored number v stands for the interval of real numbers
that round to it, v ± half a unit in the last place, and the two intervals must overlap:

    |a - b| <= ulp(a, dtype a) / 2 + ulp(b, dtype b) / 2        (equal dtypes: a == b)

So one base read as float32, bfloat16 or float16 is one base, while a fine-tune of it, which
moves nearly every value by more than that, is another. A number packed into 4 bits stands for
the interval of numbers that would be packed so (`core/quant.py`); two of one packing are the
same when each lies within the other's interval, so that a neighbouring code is another number.
Reading takes 16 small reads a tensor, whatever its size. A change of a few rows only (say, new
tokens) can slip between the samples.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sidepath.errors import DamagedAdapter, StoreError
from sidepath.injection.registry import base_parameters, registry_of
from sidepath.store.packed import (
    BYTES,
    NAMES,
    Where,
    packed_weights,
    read_at,
    sampled_file,
)
from sidepath.store.rounding import meet, overlap, ulp, within
from sidepath.store.sampling import SAMPLES, DoneWith, positions, sample_parameters
from sidepath.store.tensors import (
    FLOATING,
    file_inside,
    read_header,
    read_json,
)

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The file of a checkpoint that lies in one, and the list of files of one that does not."""
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


@dataclass(frozen=True)
class Sample:
    """One tensor's dtype (safetensors' name), shape and sampled values (raw, little-endian).

    A packed tensor's dtype is a name of `packed.NAMES`, its shape that of the matrix, and for
    each sample it holds three numbers in float32: its value and the bounds of its interval.
    """

    dtype: str
    shape: tuple[int, ...]
    raw: bytes

    @property
    def packed(self) -> bool:
        """Whether the tensor is quantised."""
        return self.dtype not in FLOATING

    def values(self) -> list[float]:
        """The sampled values as Python floats (exact for every floating dtype)."""
        return self._numbers()[::3] if self.packed else self._numbers()

    def intervals(self) -> list[tuple[float, float, float]]:
        """Each sampled value, and the least and the greatest number that it stands for."""
        numbers = self._numbers()
        if self.packed:
            return list(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))
        halves = [(value, ulp(value, self.dtype) / 2) for value in numbers]
        return [(value, value - half, value + half) for value, half in halves]

    def _numbers(self) -> list[float]:
        if not self.raw:
            return []
        dtype = torch.float32 if self.packed else FLOATING[self.dtype]
        return torch.frombuffer(bytearray(self.raw), dtype=dtype).double().tolist()


@dataclass(frozen=True)
class Fingerprint:
    """The samples of a base, by parameter name."""

    samples: Mapping[str, Sample]

    @property
    def id(self) -> str:
        """A short name to print. It differs between dtypes; `same_base` is the comparison."""
        text = json.dumps(self._tensors(), sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:16]

    def without(self, paths: Iterable[str]) -> Fingerprint:
        """The same, the modules at these paths left out."""
        outside = tuple(f"{path}." for path in paths)
        samples = self.samples.items()
        return Fingerprint({name: one for name, one in samples if not name.startswith(outside)})

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` is the inverse."""
        return {"id": self.id, "samples": SAMPLES, "tensors": self._tensors()}

    def _tensors(self) -> dict[str, list[Any]]:
        return {
            name: [sample.dtype, list(sample.shape), base64.b64encode(sample.raw).decode()]
            for name, sample in self.samples.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Fingerprint:
        """Read `as_dict`'s form. Errors: `DamagedAdapter` when it is malformed."""
        samples = {}
        faults = []
        tensors = values.get("tensors")
        if values.get("samples") != SAMPLES or not isinstance(tensors, dict):
            raise DamagedAdapter("the base's fingerprint is malformed")
        for name, entry in tensors.items():
            try:
                dtype, shape, text = entry
                raw = base64.b64decode(text, validate=True)
                size = BYTES if NAMES.fullmatch(dtype) else FLOATING[dtype].itemsize
                expected = min(SAMPLES, math.prod(shape)) * size
                samples[name] = Sample(dtype, tuple(shape), raw)
            except (KeyError, TypeError, ValueError):
                faults.append(f"{name}: malformed")
                continue
            if len(raw) != expected:
                faults.append(f"{name}: {len(raw)} bytes of samples, expected {expected}")
        if faults:
            raise DamagedAdapter("the base's fingerprint is malformed", faults=faults)
        return cls(samples)


def fingerprint(
    base: nn.Module | str | os.PathLike[str],
    *,
    leave_out: Iterable[str] = (),
    done_with: DoneWith = None,
) -> Fingerprint:
    """The fingerprint of a model in memory, or of a transformers folder on disk.

    A model is read as it was before any adapter was merged; parameters of side paths are left
    out, tied parameters come once. Modules named in `leave_out` are not looked at: those an
    adapter trains whole, since a new head is random at each load. `done_with` is told of each
    tensor of a model that was looked at: where it is a window onto a file, its pages can go. A
    folder must hold safetensors, single or sharded; 16 values a tensor are read from it.
    """
    if not isinstance(base, nn.Module):
        return Fingerprint(_of_folder(Path(base)))
    registry = registry_of(base)
    if registry is not None and registry.sampled is not None:
        return Fingerprint(registry.sampled).without(leave_out)
    outside = tuple(f"{path}." for path in leave_out)
    named = base_parameters(base) if registry is None else registry.pristine_parameters(base)
    kept = ((name, tensor) for name, tensor in named if not name.startswith(outside))
    return Fingerprint(_samples(base, kept, done_with))


def fingerprint_of(tensors: Mapping[str, torch.Tensor]) -> Fingerprint:
    """The fingerprint of plain tensors by parameter name."""
    return Fingerprint(_samples(nn.Module(), tensors.items()))


def same_base(recorded: Fingerprint, found: Fingerprint) -> list[str]:
    """The reasons why `found` is not the recorded base: an empty list when it is.

    What `recorded` does not have is not looked at. A leading name component that one side
    lacks (`model.`, `bert.`, `transformer.`: a model without its head) does not matter.
    """
    shorter: dict[str, list[str]] = {}
    for name in found.samples:
        shorter.setdefault(name.partition(".")[2], []).append(name)
    faults = []
    for name, sample in recorded.samples.items():
        candidates = [name, name.partition(".")[2], *shorter.get(name, [])]
        match = next((found.samples[other] for other in candidates if other in found.samples), None)
        if match is None:
            faults.append(f"{name}: missing")
        elif match.shape != sample.shape:
            faults.append(f"{name}: shape {list(match.shape)}, expected {list(sample.shape)}")
        else:
            differ = _differing(sample, match)
            if differ:
                total = len(sample.values())
                faults.append(f"{name}: other values ({differ} of {total} samples)")
    return faults


def _differing(one: Sample, other: Sample) -> int:
    if one.dtype == other.dtype and one.raw == other.raw:
        return 0
    if one.packed or other.packed:
        alike = within if one.dtype == other.dtype else meet
        found = zip(one.intervals(), other.intervals(), strict=True)
        return sum(not alike(a, b) for a, b in found)
    pairs = zip(one.values(), other.values(), strict=True)
    return sum(not overlap(a, one.dtype, b, other.dtype) for a, b in pairs)


def _samples(
    model: nn.Module, named: Iterable[tuple[str, torch.Tensor]], done_with: DoneWith = None
) -> dict[str, Sample]:
    sampled = sample_parameters(model, named, done_with)
    return {name: Sample(*one) for name, one in sampled.items()}


def _of_folder(folder: Path) -> dict[str, Sample]:
    samples = {}
    with ExitStack() as stack:
        where: Where = {}
        for path in checkpoint_files(folder):
            header = read_header(path, floating_only=False)
            handle = os.open(path, os.O_RDONLY)
            stack.callback(os.close, handle)
            where |= {name: (handle, info) for name, info in header.items()}
        packed = packed_weights(where)
        for name, (handle, info) in where.items():
            if name in packed:
                samples[renamed(name)] = Sample(*sampled_file(where, name, positions))
            elif info.dtype in FLOATING and not name.startswith(tuple(f"{one}." for one in packed)):
                raw = read_at(handle, info, positions(math.prod(info.shape)))
                samples[renamed(name)] = Sample(info.dtype, info.shape, raw)
    return samples


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a transformers folder, single or sharded.

    Errors: `StoreError` when there are none (a pickle is named as the reason).
    """
    if (folder / WHOLE).is_file():
        return [file_inside(folder, WHOLE)]
    index = folder / INDEX
    if index.is_file():
        try:
            names = set(read_json(index)["weight_map"].values())
            return [file_inside(folder, name) for name in sorted(names)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                "the index of a sharded checkpoint is malformed", where=index
            ) from error
    pickles = sorted(path.name for path in folder.glob("*.bin")) if folder.is_dir() else []
    raise StoreError(
        "no safetensors checkpoint in the base's folder",
        where=folder,
        found=", ".join(pickles) or None,
        expected=f"{WHOLE} or {INDEX}",
        hint="pickle files are never loaded; save the base again with save_pretrained"
        if pickles
        else "give the folder of a transformers model",
    )


def renamed(name: str) -> str:
    """A stored name as transformers' models have it: old BERTs call a norm's weight gamma."""
    for old, new in _OLD_NAMES.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name
