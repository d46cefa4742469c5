"""One safetensors file with a passport in its metadata (floor 5)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from sidepath.convert.passport import KEY, Passport, as_text, parse
from sidepath.convert.portable import Portable
from sidepath.errors import DamagedAdapter
from sidepath.store.loading import load_tensors
from sidepath.store.tensors import read_head, strict_json


def write_file(
    tensors: Mapping[str, Tensor], path: Path, portable: Portable, more: Mapping[str, str]
) -> None:
    """Write the tensors, with the metadata `more` and the adapter's passport."""
    metadata = {"format": "pt", **more, KEY: as_text(portable)}
    save_file({key: t.contiguous().clone() for key, t in tensors.items()}, path, metadata=metadata)


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str], Passport | None]:
    """The tensors of a checked file, its metadata, and the passport where there is one.

    Errors: `DamagedAdapter`; `StoreError` for a pickle.
    """
    header, head = read_head(path)
    metadata = strict_json(head[8:]).get("__metadata__") or {}
    if not all(isinstance(value, str) for value in metadata.values()):
        raise DamagedAdapter("the file's metadata are not texts", where=path)
    text = metadata.get(KEY)
    return load_tensors(path, header), metadata, None if text is None else parse(text, path)
