"""Adapters folded into a copy of their base on disk, and the proof that it is the same model.

The base's files are mapped into memory and written anew, tensor by tensor: what no adapter changes
is copied as it lies, the sum of the updates is added in float32, and each changed weight is rounded
once. What was written is read again with plain transformers and run beside the base with the
un-merged adapters, both in float32 (floor 5).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from sidepath.errors import ConfigError, ParityError, SidepathNotice
from sidepath.injection.registry import open_registry, require_registry
from sidepath.injection.surgery import activate
from sidepath.merging.base import Base, load_base, make_float, read_model, refuse_fresh
from sidepath.merging.contents import write_tensors
from sidepath.merging.digests import Digests
from sidepath.merging.folded import to_float32
from sidepath.merging.leftovers import leftovers, told
from sidepath.merging.mapped import Mapped
from sidepath.merging.peak import peak_bytes, reset_peak
from sidepath.merging.proof import Loaded, Rounding, parity
from sidepath.merging.settings import write_settings, write_tokens
from sidepath.merging.writing import Entry
from sidepath.methods.lora import LoRA
from sidepath.store.adapter import load
from sidepath.store.fingerprint import Fingerprint, checkpoint_files, fingerprint
from sidepath.store.folder import lists_all_files, publish, refuse_within, sha256_file
from sidepath.store.hub import ADAPTER, BASE, local, origin_of
from sidepath.store.parity import PARITY, Parity, calibration_rows, rows_with
from sidepath.store.peft_format import WEIGHTS
from sidepath.store.precision import survivals, together
from sidepath.store.sums import add_up
from sidepath.store.tensors import FLOATING, read_header

_UNCHECKED = (
    "{}: PARITY NOT MEASURED: nothing shows that this merged model gives the adapter's outputs"
)


@dataclass(frozen=True)
class Merged:
    """What `merge_folder` published."""

    output: Path
    parity: Parity | None
    """None when it was not measured."""
    peaks: Mapping[str, int | None]
    """Most bytes that the process had resident while it merged (`merge`) and while it measured the
    parity (`parity`), pages of mapped files included."""
    dequantised: int = 0
    """Weights that are dequantised ones, since the adapter was trained over a 4-bit base."""
    requantised: dict[str, Any] | None = None
    """What would survive quantising the merged weights again (see `precision.Survival`)."""
    carried: Mapping[str, Any] | None = None
    """Tensors of the base that its model has no place for: how many, their bytes and names."""

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of `sidepath merge`."""
        document = {
            "output": str(self.output),
            "parity": None if self.parity is None else self.parity.as_dict(),
            "peak_memory_bytes": dict(self.peaks),
            "dequantised": self.dequantised,
            "carried": self.carried,
        }
        if self.requantised is not None:
            document["requantised"] = self.requantised
        return document


def replaceable(folder: Path) -> bool:
    """Whether a folder holds a merged model and nothing else: another one may replace it."""
    return lists_all_files(folder, (PARITY,))


# Over 40 lines: what becomes of each kind of base is told where users look for it.
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
    in another dtype than the base's. The folder is plain: names and files as the base's, its
    tokenizer, and `parity.json` with the measured difference on `calibration` texts (a built-in few
    when not given) and the adapters' digests. Neither the base's folder nor the adapters' change.

    Tensors of the base that its model has no place for are carried over as they are, and counted.
    Tied embeddings of which the adapters change one side alone are written apart, and the config
    says so.

    When the base is stored in 4 bits, or an adapter was trained over a base that was, the merged
    model is plain all the same: the adapters are added to the dequantised weights. `requantise`
    ("nf4") measures what packing the merged weights again would leave of the updates.

    Needs memory for the adapters and for one tensor at a time, in float32 (a DoRA's: twice). Two
    kinds of base are held whole: quantised ones, dequantised; and those whose folder holds other
    tensors than the model (mixtures of experts), for which a `SidepathNotice` says so. Parity needs
    the model's embeddings, one block and 512 MiB of others in float32, and 256 MiB of outputs.

    Errors: `ParityError` beyond the tolerance (nothing is published), `TiedWeights` for tied
    tensors that no config parts, `MergeError`, `WrongBase`, `DamagedAdapter`, `WriteFailed`, ...
    """
    base, output = local(base, BASE), Path(output)
    folders = [local(adapter, ADAPTER) for adapter in adapters]
    refuse_within([base, *folders], output)
    reset_peak()
    ready = _prepare(base, folders, dtype, calibration, allow_other_base)
    left = None if requantise is None else _left(ready, requantise)
    with publish(output, manifests=(PARITY,)) as temporary, Digests() as digests:
        _write(ready, base, temporary, digests)
        peaks = {"merge": peak_bytes()}
        measured = None if skip_parity else _proved(ready, temporary, output)
        peaks["parity"] = None if skip_parity else peak_bytes()
        carried = told(ready.carried)
        known = {**origin_of(base), "fingerprint": ready.identity.id}
        record = {"base": known, "peak_memory_bytes": peaks, "carried": carried}
        _write_record(temporary, measured, folders, digests, record)
    if skip_parity:
        warnings.warn(_UNCHECKED.format(output), SidepathNotice, stacklevel=2)
    return Merged(output, measured, peaks, ready.dequantised, left, carried)


class _Ready(NamedTuple):
    """A base with the sum of the adapters active on it, and what there is to know of it."""

    loaded: Loaded
    cls: Any
    """Its class as transformers has it."""
    options: Mapping[str, Any]
    """What transformers was asked for to load it."""
    name: str
    """The adapter that is active."""
    identity: Fingerprint
    rounding: Rounding
    rows: list[list[int]]
    """Token ids that parity is measured on."""
    dequantised: int
    carried: list[Entry]
    """Tensors of the base that its model has no place for."""


def _prepare(
    base: Path,
    folders: Sequence[Path],
    dtype: str | None,
    calibration: Sequence[str] | None,
    allow_other_base: bool,
) -> _Ready:
    """Load the base and the adapters; everything that the user can be wrong about is found here."""
    if not folders:
        raise ConfigError("no adapter to merge")
    target = None if dtype is None else _dtype(dtype)
    opened = load_base(base, folders)
    model, cls, options, _, unread = opened
    carried = leftovers(model, unread, base)
    vocabulary = int(model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
    rows = calibration_rows(base, vocabulary, calibration)
    mapped = Mapped(checkpoint_files(base))
    identity = fingerprint(model, done_with=mapped.release)
    held = make_float(model, folders, allow_other_base)
    name = _load_adapters(model, folders, identity, allow_other_base or bool(held.quantised))
    refuse_fresh(opened, base)
    rows += rows_with(rows[0], _trained_tokens(model))
    rounding, count = _rounding(held, target), len(held.quantised)
    loaded = Loaded(model, mapped)
    return _Ready(loaded, cls, options, name, identity, rounding, rows, count, carried)


def _left(ready: _Ready, kind: str) -> dict[str, Any]:
    """What packing the merged weights again would leave of the updates."""
    return together(survivals(ready.loaded.model, ready.name, kind, ready.rounding.stored))


def _write(ready: _Ready, base: Path, folder: Path, digests: Digests) -> None:
    """The merged model's weights, settings and tokenizer, into a folder that nobody reads yet."""
    loaded, cls, stored = ready.loaded, ready.cls, ready.rounding.stored
    write_tensors(loaded, cls, ready.name, stored, base, folder, ready.carried, digests.take)
    write_settings(loaded.model, cls, stored, base, folder)
    write_tokens(require_registry(loaded.model).adapter(ready.name), base, folder)


def _proved(ready: _Ready, folder: Path, output: Path) -> Parity:
    """Read what was written as plain transformers does, and compare it with the un-merged model.

    Errors: `ParityError` where they differ by more than rounding explains.
    """
    reset_peak()
    options = {**ready.options, "dtype": _reading_dtype(folder)}
    merged, _, _ = read_model(ready.cls, folder, options)
    written = Loaded(merged, Mapped(checkpoint_files(folder)))
    found = parity(ready.loaded, ready.name, ready.rows, ready.rounding, written)
    if not found.holds:
        raise ParityError(
            "the merged model does not give the un-merged model's outputs; nothing was published",
            where=output,
            found=f"largest difference {found.max_abs:.3g}, mean {found.mean_abs:.3g}, same "
            f"first choice at {found.top1:.1%} of {found.positions} positions",
            expected=f"at most {found.tolerance:.3g}, mean {found.mean_tolerance:.3g}",
            hint="merge in float32 (dtype), or keep the adapter beside the base; skip_parity "
            "publishes all the same",
        )
    return found


def _dtype(name: str) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ConfigError("unknown dtype to merge to", found=name, expected=", ".join(known))
    return known[name]


def _trained_tokens(model: nn.Module) -> list[int]:
    """The ids whose rows an adapter on the model has, which no calibration text need hold."""
    configs = (one.config for one in require_registry(model).adapters.values())
    return sorted({i for one in configs if isinstance(one, LoRA) for i in one.token_rows})


def _rounding(held: Base, target: torch.dtype | None) -> Rounding:
    stored = {
        full: target if target is not None and dtype.is_floating_point else dtype
        for full, dtype in held.stored.items()
    }
    return Rounding(stored, held.exact)


def _reading_dtype(folder: Path) -> torch.dtype:
    """What a folder is read in so that no value is rounded: its dtype, if it has but one."""
    found = {
        FLOATING[info.dtype]
        for path in checkpoint_files(folder)
        for info in read_header(path, floating_only=False).values()
        if info.dtype in FLOATING
    }
    return found.pop() if len(found) == 1 else torch.float32


def _load_adapters(
    model: nn.Module, folders: Sequence[Path], identity: Fingerprint, allow_other_base: bool
) -> str:
    """Load the adapters, in float32, and activate their sum; returns its name."""
    open_registry(model).sampled = identity.samples
    names = [f"adapter-{number}" for number in range(len(folders))]
    for name, folder in zip(names, folders, strict=True):
        load(model, folder, name, allow_other_base=allow_other_base)
    for installed in require_registry(model).adapters.values():
        for delta in installed.deltas.values():
            delta._apply(to_float32)  # type: ignore[no-untyped-call]
    if len(names) > 1:
        return add_up(model, names)
    activate(model, names[0])
    return names[0]


def _write_record(
    folder: Path,
    parity: Parity | None,
    adapters: Sequence[Path],
    digests: Digests,
    record: Mapping[str, Any],
) -> None:
    merged = [{**origin_of(path), "digest": sha256_file(path / WEIGHTS)} for path in adapters]
    values = {
        **(parity.as_dict() if parity else {"skipped": True}),
        "adapters": merged,
        **record,
        "files": {path.name: digests.of(path) for path in sorted(folder.iterdir())},
    }
    (folder / PARITY).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
