"""The base of a merge, as its folder stores it and without its 4-bit layers (floor 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sidepath.core.quant import is_packed, require_bitsandbytes
from sidepath.errors import StoreError
from sidepath.injection.quantising import keep_heads_plain, settle
from sidepath.injection.registry import require_registry
from sidepath.injection.surgery import remove
from sidepath.store import manifest as manifests
from sidepath.store.adapter import load
from sidepath.store.configs import config_of, labelled, understood
from sidepath.store.fingerprint import checkpoint_files
from sidepath.store.manifest import Manifest, read_manifest
from sidepath.store.precision import make_plain, recorded_packing
from sidepath.store.tensors import read_header

UNLOADABLE = "transformers cannot load the model"
_OF_CONFIG = ("labels", "id2label", "label2id")
"""Options that belong to a model's config."""


class Opened(NamedTuple):
    """A model that transformers loaded from a folder."""

    model: nn.Module
    cls: Any
    """Its class as transformers has it."""
    options: Mapping[str, Any]
    """What transformers was asked for."""
    fresh: Sequence[str]
    """Parameters that the folder does not hold: their values are random."""
    unread: Sequence[str]
    """Tensors of the folder that transformers had no use for, but for those it never tells of."""


def load_base(base: Path, folders: Sequence[Path]) -> Opened:
    """The base in its stored dtype, as the class the first adapter was trained on.

    Errors: `StoreError` for a folder that holds no model of transformers', or an absurd one;
    `DamagedAdapter` for a file that cannot be trusted.
    """
    import transformers

    for path in checkpoint_files(base):
        read_header(path, floating_only=False)  # before anything maps it into memory
    manifest = _manifest_of(folders[0])
    options: dict[str, Any] = {"dtype": "auto", "local_files_only": True, "use_safetensors": True}
    settings = config_of(base)
    names = [manifest.model_class] if manifest else settings.architectures
    name = names[0] if isinstance(names, list) and names else None
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise StoreError("the base's class is not one of transformers'", where=base, found=names)
    if manifest is not None and manifest.labels is not None:
        options |= labelled(manifest.labels)
    packed = _packed_options(cls, base, options) if _is_packed(settings) else options
    model, fresh, unread = read_model(cls, base, packed)
    return Opened(settle(model), cls, options, fresh, unread)


def refuse_fresh(opened: Opened, base: Path) -> None:
    """Refuse a base without weights that its adapters do not hold whole.

    A classifier's head is often new, and then the adapter's. Errors: `StoreError` that names all.
    """
    adapters = require_registry(opened.model).adapters.values()
    whole = tuple(
        f"{path}." for one in adapters for path, site in one.sites.items() if site.kind == "whole"
    )
    faults = [name for name in opened.fresh if not name.startswith(whole)]
    if faults:
        raise StoreError(
            "the base's checkpoint lacks weights of its model, and no adapter holds them whole",
            where=base,
            faults=faults,
            hint="fetch the base again",
        )


def _is_packed(settings: Any) -> bool:
    return "quantization_config" in vars(settings)


def _packed_options(cls: Any, base: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """How a folder that is stored packed is loaded, so that a head it lacks is a plain layer."""
    require_bitsandbytes()
    of_config = {name: value for name, value in options.items() if name.endswith(_OF_CONFIG)}
    with understood(base, UNLOADABLE):
        settings = cls.config_class.from_pretrained(base, local_files_only=True, **of_config)
        with torch.device("meta"):
            skeleton = cls(settings)
    keep_heads_plain(settings, skeleton)
    others = {name: value for name, value in options.items() if name not in of_config}
    return {**others, "config": settings, "device_map": {"": "cpu"}}


def _manifest_of(folder: Path) -> Manifest | None:
    return read_manifest(folder)[0] if manifests.is_ours(folder) else None


def read_model(
    cls: Any, folder: Path, options: Mapping[str, Any]
) -> tuple[nn.Module, list[str], list[str]]:
    """A folder's model, in eval mode; the parameters that the folder does not hold, and the tensors
    of it that the model has no use for.

    Errors: `StoreError` with what transformers says.
    """
    with understood(folder, UNLOADABLE):
        model, notes = cls.from_pretrained(folder, output_loading_info=True, **options)
    assert isinstance(model, nn.Module)
    return model.eval(), sorted(notes["missing_keys"]), sorted(notes["unexpected_keys"])


@dataclass(frozen=True)
class Base:
    """The dtypes of a base's tensors, as they come and as they are to be written."""

    stored: dict[str, torch.dtype]
    """What each tensor is written in, unless the user says otherwise."""
    exact: dict[str, torch.dtype]
    """The dtype that holds each tensor's values exactly."""
    quantised: dict[str, torch.dtype]
    """Weights that are dequantised ones, with the dtype they were quantised from."""


def make_float(model: nn.Module, folders: Sequence[Path], allow_other_base: bool) -> Base:
    """Dequantise the 4-bit weights of a base to float32, in place; the others stay as they are.

    The adapters are checked against the base as it is stored: what it is dequantised to has other
    values than the base that an adapter may have been trained over.
    """
    stored = {full: tensor.dtype for full, tensor in tensors_of(model).items()}
    packing = recorded_packing({folder: _manifest_of(folder) for folder in folders})
    quantised: dict[str, torch.dtype] = {}
    if packing or any(is_packed(module) for module in model.modules()):
        _check_adapters(model, folders, allow_other_base)
        quantised = make_plain(model, packing)
    stored |= {full: dtype for full, dtype in quantised.items() if stored[full] == torch.uint8}
    return Base(stored, stored | dict.fromkeys(quantised, torch.float32), quantised)


def _check_adapters(model: nn.Module, folders: Sequence[Path], allow_other_base: bool) -> None:
    """Raise what loading the adapters onto the base, as it is stored, raises."""
    for folder in folders:
        load(model, folder, "checked", allow_other_base=allow_other_base)
        remove(model, "checked")


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by all their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
