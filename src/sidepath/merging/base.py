"""The base of a merge, as its folder stores it and without its 4-bit layers (floor 5)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sidepath.core.quant import is_packed, require_bitsandbytes
from sidepath.errors import StoreError
from sidepath.injection.quantising import keep_heads_plain, settle
from sidepath.injection.surgery import remove
from sidepath.store import manifest as manifests
from sidepath.store.adapter import load
from sidepath.store.fingerprint import checkpoint_files
from sidepath.store.manifest import Manifest, read_manifest
from sidepath.store.precision import make_plain, recorded_packing

_OF_CONFIG = ("labels", "id2label", "label2id")
"""Options that belong to a model's config."""


def load_base(base: Path, folders: Sequence[Path]) -> tuple[nn.Module, Any, dict[str, Any]]:
    """The base in its stored dtype, as the class the first adapter was trained on."""
    import transformers

    checkpoint_files(base)
    manifest = _manifest_of(folders[0])
    options: dict[str, Any] = {"dtype": "auto", "local_files_only": True, "use_safetensors": True}
    with understood(base):
        settings = transformers.AutoConfig.from_pretrained(
            base, local_files_only=True, trust_remote_code=False
        )
    names = [manifest.model_class] if manifest else list(settings.architectures or [])
    cls = getattr(transformers, names[0], None) if names else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise StoreError("the base's class is not one of transformers'", where=base, found=names)
    if manifest is not None and manifest.labels is not None:
        labels = dict(enumerate(manifest.labels))
        options |= {
            "num_labels": len(labels),
            "id2label": labels,
            "label2id": {label: number for number, label in labels.items()},
        }
    packed = _packed_options(cls, base, options) if _is_packed(settings) else options
    return settle(read_model(cls, base, packed)), cls, options


def _is_packed(settings: Any) -> bool:
    return "quantization_config" in vars(settings)


def _packed_options(cls: Any, base: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """How a folder that is stored packed is loaded, so that a head it lacks is a plain layer."""
    require_bitsandbytes()
    of_config = {name: value for name, value in options.items() if name.endswith(_OF_CONFIG)}
    with understood(base):
        settings = cls.config_class.from_pretrained(base, local_files_only=True, **of_config)
        with torch.device("meta"):
            skeleton = cls(settings)
    keep_heads_plain(settings, skeleton)
    others = {name: value for name, value in options.items() if name not in of_config}
    return {**others, "config": settings, "device_map": {"": "cpu"}}


def _manifest_of(folder: Path) -> Manifest | None:
    return read_manifest(folder)[0] if (folder / manifests.NAME).is_file() else None


def read_model(cls: Any, folder: Path, options: Mapping[str, Any]) -> nn.Module:
    """A folder's model, in eval mode. Errors: `StoreError` with what transformers says."""
    with understood(folder):
        model = cls.from_pretrained(folder, **options)
    assert isinstance(model, nn.Module)
    return model.eval()


@contextmanager
def understood(folder: Path) -> Iterator[None]:
    """Turn what transformers raises over a folder into one message of ours."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise StoreError("transformers cannot load the model", where=folder, found=text) from error


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
