"""An adapter between two formats: PEFT's names in memory, and its manifest (floor 5).

Dimensions: R rank, I columns, O rows of an adapted matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sidepath.convert.outside import names_of
from sidepath.errors import DamagedAdapter, StoreError
from sidepath.methods.lora import LoRA
from sidepath.store import manifest as manifests
from sidepath.store.loading import load_tensors
from sidepath.store.manifest import Manifest, check_tensors, read_manifest
from sidepath.store.new_tokens import read_tokens
from sidepath.store.peft_config import (
    PeftSettings,
    anchored,
    commonest,
    read_settings,
    targets_for,
)
from sidepath.store.peft_format import CONFIG, MAGNITUDE, PAIRS, PREFIX, TOKENS, WEIGHTS
from sidepath.store.peft_tokens import INDICES
from sidepath.store.tensors import file_inside, read_header, read_json


@dataclass(frozen=True)
class Base:
    """The base of an adapter, as far as its names and shapes go."""

    model: nn.Module
    """Its modules; their weights may be on the meta device."""
    folder: Path | None = None
    """Where its weights are, for the fingerprint."""


@dataclass(frozen=True)
class Options:
    """What a format does not say about itself, and the user has to."""

    base: Base | None = None
    alpha: float | None = None
    """loralib's `lora_alpha`."""
    fused: Mapping[str, Sequence[bool]] = field(default_factory=dict)
    """Which of the equal parts of loralib's fused projections are adapted (`enable_lora`)."""
    component: str = "text_encoder"
    """Which part of an image pipeline the adapter belongs to, in diffusers' words."""
    name: str = "adapter"
    """What the adapter is called."""


@dataclass(frozen=True)
class Update:
    """The update `s B A` of one matrix: A (R, I), B (O, R); a convolution's keep their kernels."""

    A: Tensor
    B: Tensor
    scaling: float
    embedding: bool = False
    magnitude: Tensor | None = None
    """DoRA's norms (O)."""

    @property
    def r(self) -> int:
        """The rank."""
        return len(self.A)

    @property
    def alpha(self) -> float:
        """The alpha with which `alpha / r` is the scaling."""
        return self.scaling * self.r


@dataclass(frozen=True)
class Portable:
    """An adapter's tensors by PEFT's keys, its settings, and its manifest where it has one."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]
    """The contents of `adapter_config.json`."""
    manifest: Manifest | None = None
    tokens: Mapping[str, int] = field(default_factory=dict)
    """The tokens that it brings, by their texts."""
    notes: tuple[str, ...] = ()
    """What the user should know about how it was read or written."""

    @property
    def settings(self) -> PeftSettings:
        """The settings, checked. Errors: `DamagedAdapter`."""
        settings, faults = read_settings(self.values)
        if faults:
            raise DamagedAdapter(f"{CONFIG} has faults", faults=faults)
        return settings

    def updates(self) -> dict[str, Update]:
        """Every low-rank update by module path. Errors: `DamagedAdapter` with all faults."""
        settings = self.settings
        faults: list[str] = []
        found: dict[str, Update] = {}
        for start, (A, B, embedding) in _pairs(self.tensors, faults).items():
            path = start.removeprefix(PREFIX)
            fault = _misfit(path, A, B, settings)
            if fault:
                faults.append(fault)
                continue
            scaling = settings.scaling_of(path)
            found[path] = Update(A, B, scaling, embedding, self.tensors.get(start + MAGNITUDE))
        if not found and not faults:
            faults = ["it holds no lora_A and lora_B tensors"]
        if faults:
            raise DamagedAdapter("the adapter's updates cannot be read", faults=faults)
        return found

    def others(self) -> list[str]:
        """Keys of tensors that belong to no low-rank update: biases, modules trained whole."""
        return [key for key in self.tensors if not key.endswith((*PAIRS[0], *PAIRS[1], MAGNITUDE))]


def _pairs(
    tensors: Mapping[str, Tensor], faults: list[str]
) -> dict[str, tuple[Tensor, Tensor, bool]]:
    found = {}
    for endings, embedding in zip(PAIRS, (False, True), strict=True):
        for start in names_of(tensors, endings):
            missing = [start + end for end in endings if start + end not in tensors]
            faults += [f"{key}: missing" for key in missing]
            if start in found:
                faults.append(f"{start}: has the update of a matrix and that of an embedding")
            elif not missing:
                A, B = (tensors[start + end] for end in endings)
                found[start] = A, B, embedding
    return found


def _misfit(path: str, A: Tensor, B: Tensor, settings: PeftSettings) -> str | None:
    r = settings.rank_at(path)
    if min(A.dim(), B.dim()) < 2 or A.dim() != B.dim() or 0 in (*A.shape, *B.shape):
        return f"{path}: A {list(A.shape)} and B {list(B.shape)}, expected two matrices"
    groups = r // B.shape[1]  # a grouped convolution's A has a block for each group
    if A.shape[0] != r or groups * B.shape[1] != r or (groups != 1 and A.dim() == 2):
        return f"{path}: A {list(A.shape)} and B {list(B.shape)}, the settings say rank {r}"
    return None


def read_adapter(folder: Path, options: Options) -> Portable:
    """An adapter's folder, ours or PEFT's, on the CPU. Everything in it is checked first.

    Errors: `DamagedAdapter` with all faults; `StoreError` for a method without a form elsewhere.
    """
    path = file_inside(folder, WEIGHTS)
    header = read_header(path)
    manifest, faults = None, list[str]()
    if (folder / manifests.NAME).exists():
        manifest, faults = read_manifest(folder)
        faults += [] if manifest is None else check_tensors(manifest, header)
        if manifest is not None and not isinstance(manifest.config, LoRA):
            raise StoreError(
                f"{manifest.config.method} is a method that no other tool's format has a form for",
                where=folder,
                expected="an adapter of the method lora",
            )
    values: Any = {}
    try:
        values = read_json(file_inside(folder, CONFIG))
        faults += read_settings(values)[1]
    except ValueError as error:
        faults.append(f"{CONFIG}: not JSON: {error}")
    if faults:
        raise DamagedAdapter("the adapter cannot be trusted", where=folder, faults=faults)
    rows = read_settings(values)[0].token_rows
    tokens, more = read_tokens(folder, rows, ours=manifest is not None)
    if bool(rows) != any(key.endswith(TOKENS) for key in header):
        more.append(f"{CONFIG}: {len(rows)} tokens in {INDICES}, which {WEIGHTS} has not")
    if more:
        raise DamagedAdapter("the adapter cannot be trusted", where=folder, faults=more)
    found = Portable(load_tensors(path, header), values, manifest, tokens)
    found.updates()
    return found


def portable_of(
    updates: Mapping[str, Update],
    *,
    options: Options,
    dropout: float = 0.0,
    notes: Iterable[str] = (),
) -> Portable:
    """An adapter of these updates, in PEFT's terms: each rank and alpha as they are.

    The settings name the modules by their whole paths; with a base, as a list where that names
    no other module too.
    """
    ranks = {path: one.r for path, one in updates.items()}
    alphas = {path: _number(one.alpha) for path, one in updates.items()}
    r, alpha = commonest(ranks.values()), commonest(alphas.values())
    names = (
        None if options.base is None else [name for name, _ in options.base.model.named_modules()]
    )
    values = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": False,
        "use_dora": any(update.magnitude is not None for update in updates.values()),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": targets_for(list(updates), names),
        "modules_to_save": None,
        "rank_pattern": {anchored(path): n for path, n in ranks.items() if n != r},
        "alpha_pattern": {anchored(path): n for path, n in alphas.items() if n != alpha},
    }
    return Portable(tensors_of(updates), values, notes=tuple(notes))


def _number(value: float) -> float:
    # A factor that came through float32 is the number that was meant.
    near = round(value)
    if near and abs(value / near - 1) < 1e-6:
        return near
    return value


def tensors_of(updates: Mapping[str, Update]) -> dict[str, Tensor]:
    """The updates' tensors by PEFT's keys."""
    tensors: dict[str, Tensor] = {}
    for path, one in updates.items():
        for ending, tensor in zip(PAIRS[one.embedding], (one.A, one.B), strict=True):
            tensors[PREFIX + path + ending] = tensor
        if one.magnitude is not None:
            tensors[PREFIX + path + MAGNITUDE] = one.magnitude
    return tensors


def _kind_of(key: str) -> str:
    return "rows of tokens" if key.endswith(TOKENS) else "a tensor of the base's own"


def require_sayable(
    portable: Portable,
    format_name: str,
    *,
    dora: bool = False,
    embeddings: bool = False,
    convolutions: bool = False,
) -> dict[str, Update]:
    """The updates of an adapter that a format can say all of. Changes nothing.

    Errors: one `StoreError` that names everything the format has no place for.
    """
    updates = portable.updates()
    faults = [f"{key.removeprefix(PREFIX)}: {_kind_of(key)}" for key in portable.others()]
    for path, update in updates.items():
        if update.magnitude is not None and not dora:
            faults.append(f"{path}: DoRA's magnitude")
        if update.embedding and not embeddings:
            faults.append(f"{path}: the update of an embedding")
        if update.A.dim() > 2 and not convolutions:
            faults.append(f"{path}: the update of a convolution")
    if faults:
        raise StoreError(
            f"the adapter holds what {format_name} has no place for; nothing was written",
            faults=faults,
            hint="keep it in PEFT's format, or merge it into the base: sidepath merge",
        )
    return updates
