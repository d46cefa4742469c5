"""Adapters folded into a copy of their base on disk, and the proof that it is the same model.

The base is read in the dtype it is stored in, the sum of the updates is added in float32, and
each changed weight is rounded once. What was written is read again with plain transformers and
run beside the base with the un-merged adapters, both in float32 (floor 4).
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sidepath.errors import ConfigError, ParityError, StoreError
from sidepath.injection.merging import merge, unmerge
from sidepath.injection.registry import base_parameters, require_registry
from sidepath.injection.surgery import activate, remove
from sidepath.store import manifest as manifests
from sidepath.store.adapter import PARITY, SidepathNotice, load
from sidepath.store.fingerprint import fingerprint
from sidepath.store.folder import publish, sha256_file
from sidepath.store.hub import ADAPTER, BASE, local, origin_of
from sidepath.store.merge_base import load_base, make_float, read_model, tensors_of, understood
from sidepath.store.parity import Parity, calibration_rows, compare, disturbed, outputs_of
from sidepath.store.peft_format import WEIGHTS
from sidepath.store.precision import survivals, together
from sidepath.store.sums import add_up

_UNCHECKED = (
    "{}: PARITY NOT MEASURED: nothing shows that this merged model gives the adapter's outputs"
)
_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_NOT_COPIED = (PARITY, manifests.NAME, "config.json", "model.safetensors.index.json")


@dataclass(frozen=True)
class Merged:
    """What `merge_folder` published."""

    output: Path
    parity: Parity | None
    """None when it was not measured."""
    dequantised: int = 0
    """Weights that are dequantised ones, since the adapter was trained over a 4-bit base."""
    requantised: dict[str, Any] | None = None
    """What would survive quantising the merged weights again (see `precision.Survival`)."""

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of `sidepath merge`."""
        parity = None if self.parity is None else self.parity.as_dict()
        document = {"output": str(self.output), "parity": parity, "dequantised": self.dequantised}
        if self.requantised is not None:
            document["requantised"] = self.requantised
        return document


def merge_folder(
    base: str | Path,
    adapters: Sequence[str | Path],
    output: str | Path,
    *,
    skip_parity: bool = False,
    calibration: Sequence[str] | None = None,
    dtype: str | None = None,
    allow_other_base: bool = False,
    requantise: str | None = None,
) -> Merged:
    """Write `output`: the transformers folder `base` with the adapters folded in.

    Base and adapters may be names on the hub, `hub:OWNER/NAME[@REVISION]`.
    Several adapters are added up. `dtype` (float32, bfloat16, float16) stores the merged model
    in another dtype than the base's. The folder is plain: names as the base's, its tokenizer,
    and `parity.json` with the measured difference on `calibration` texts (a built-in few when
    not given) and the adapters' digests. Neither the base's folder nor the adapters' change.

    When the base is stored in 4 bits, or an adapter was trained over a base that was, the merged
    model is plain all the same: the adapters are added to the dequantised weights. `requantise`
    ("nf4") measures what packing the merged weights again would leave of the updates.

    Needs memory for the base in float32 and its changed weights once more.

    Errors: `ParityError` beyond the tolerance (nothing is published), `TiedWeights` when a
    changed tensor is shared, `MergeError`, `WrongBase`, `DamagedAdapter`, `WriteFailed`, ...
    """
    base, output = local(base, BASE), Path(output)
    folders = [local(adapter, ADAPTER) for adapter in adapters]
    target = None if dtype is None else _dtype(dtype)
    _refuse_places(base, folders, output)
    model, cls, options = load_base(base, folders)
    vocabulary = int(model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
    rows = calibration_rows(base, vocabulary, calibration)
    identity = fingerprint(model).id
    held = make_float(model, folders, allow_other_base)
    stored = {full: target or dtype for full, dtype in held.stored.items()}
    name = _load_adapters(model, folders, allow_other_base or bool(held.quantised))
    model.float()
    left = None if requantise is None else together(survivals(model, name, requantise, stored))
    runs = None if skip_parity else _run_unmerged(model, name, rows, held.exact, stored)
    merge(model, name)
    _make_plain(model, stored)
    with publish(output, manifests=(PARITY,)) as temporary:
        _write(model, base, temporary)
        del model
        parity = None
        if runs is None:
            warnings.warn(_UNCHECKED.format(output), SidepathNotice, stacklevel=2)
        else:
            exact = {**options, "dtype": torch.float32}
            merged = outputs_of(read_model(cls, temporary, exact), rows)
            parity = _proved(runs, merged, output)
        _write_record(temporary, parity, folders, {**origin_of(base), "fingerprint": identity})
    return Merged(output, parity, len(held.quantised), left)


def _dtype(name: str) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ConfigError("unknown dtype to merge to", found=name, expected=", ".join(known))
    return known[name]


def _refuse_places(base: Path, folders: Sequence[Path], output: Path) -> None:
    if not folders:
        raise ConfigError("no adapter to merge")
    if output.resolve() in {path.resolve() for path in (base, *folders)}:
        raise StoreError(
            "the output is one of the folders that are read", where=output, hint="choose another"
        )


def _load_adapters(model: nn.Module, folders: Sequence[Path], allow_other_base: bool) -> str:
    """Load the adapters and activate their sum; returns its name."""
    names = [f"adapter-{number}" for number in range(len(folders))]
    for name, folder in zip(names, folders, strict=True):
        load(model, folder, name, allow_other_base=allow_other_base)
    if len(names) == 1:
        return names[0]
    return add_up(model, names)


@dataclass(frozen=True)
class _Runs:
    """Outputs of the un-merged model and of the base alone; what rounding does to the outputs."""

    unmerged: list[Tensor]
    base: list[Tensor]
    noise: list[Tensor]


def _run_unmerged(
    model: nn.Module,
    name: str,
    rows: Sequence[Sequence[int]],
    dtypes: Mapping[str, torch.dtype],
    stored: Mapping[str, torch.dtype],
) -> _Runs:
    """Run the model with and without its adapter, and merged in memory with rounding noise.

    The model is in float32; afterwards it is as it was.
    """
    unmerged = outputs_of(model, rows)
    activate(model, None)
    base = outputs_of(model, rows)
    activate(model, name)
    merge(model, name)
    changed = require_registry(model).pristine
    rounded = {
        full: parameter
        for full, parameter in base_parameters(model)
        if full in changed or stored[full] != dtypes[full]
    }
    exact = outputs_of(model, rows)
    with disturbed(rounded, stored):
        noisy = outputs_of(model, rows)
    unmerge(model)
    return _Runs(unmerged, base, [one - other for one, other in zip(exact, noisy, strict=True)])


def _make_plain(model: nn.Module, stored: Mapping[str, torch.dtype]) -> None:
    """Make the merged model (in float32) a plain one in its stored dtypes, in place."""
    registry = require_registry(model)
    kept = {full: _holder(model, full).detach().clone() for full in registry.pristine}
    unmerge(model)
    for name in reversed(list(registry.adapters)):
        remove(model, name)
    for full, tensor in kept.items():
        _holder(model, full).data = tensor
    for full, tensor in tensors_of(model).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(stored[full])


def _holder(model: nn.Module, full: str) -> Tensor:
    path, _, local = full.rpartition(".")
    module = model.get_submodule(path)
    return module.get_buffer(local) if local in module._buffers else module.get_parameter(local)


def _write(model: nn.Module, base: Path, folder: Path) -> None:
    with understood(base):
        model.save_pretrained(folder)  # type: ignore[operator]
    for path in sorted(base.iterdir()):
        left_out = path.name in _NOT_COPIED or path.name.startswith("adapter_")
        if path.is_file() and path.suffix in _COPIED and not left_out:
            shutil.copyfile(path, folder / path.name)


def _proved(runs: _Runs, merged: Sequence[Tensor], output: Path) -> Parity:
    """The difference of the written model's outputs; raises `ParityError` where it is too large."""
    parity = compare(runs.unmerged, merged, runs.base, runs.noise)
    if not parity.holds:
        raise ParityError(
            "the merged model does not give the un-merged model's outputs; nothing was published",
            where=output,
            found=f"largest difference {parity.max_abs:.3g}, mean {parity.mean_abs:.3g}, same "
            f"first choice at {parity.top1:.1%} of {parity.positions} positions",
            expected=f"at most {parity.tolerance:.3g}, mean {parity.mean_tolerance:.3g}",
            hint="merge in float32 (dtype), or keep the adapter beside the base; skip_parity "
            "publishes all the same",
        )
    return parity


def _write_record(
    folder: Path, parity: Parity | None, adapters: Sequence[Path], base: Mapping[str, Any]
) -> None:
    digests = [{**origin_of(path), "digest": sha256_file(path / WEIGHTS)} for path in adapters]
    values = {
        **(parity.as_dict() if parity else {"skipped": True}),
        "adapters": digests,
        "base": base,
        "files": {path.name: sha256_file(path) for path in sorted(folder.iterdir())},
    }
    (folder / PARITY).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
