"""Adapter folders: ours, and PEFT's (floor 5)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from safetensors.torch import save_file

from sidepath.convert.portable import Options, Portable
from sidepath.store import new_tokens
from sidepath.store.card import CARD, model_card
from sidepath.store.manifest import write_manifest
from sidepath.store.peft_format import CONFIG, WEIGHTS
from sidepath.store.saving import merged_record

OURS = "sidepath"
"""What our own format is called."""
UNVERIFIED = (
    "its base is not verified: the folder has no sidepath.json; give --base, and it gets one with "
    "the base's fingerprint"
)


def write_peft(portable: Portable, folder: Path) -> None:
    """Write PEFT's two files into an empty folder, and the document of the tokens it brings."""
    whole = {key: tensor.contiguous().clone() for key, tensor in portable.tensors.items()}
    save_file(whole, folder / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(dict(portable.values), indent=2) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    if portable.tokens:
        text = new_tokens.as_text(portable.tokens)
        (folder / new_tokens.NAME).write_text(text, encoding="utf-8")


def write_plain(portable: Portable, folder: Path, options: Options) -> list[str]:
    """A folder of PEFT's: no manifest."""
    write_peft(portable, folder)
    return []


def write_ours(portable: Portable, folder: Path, options: Options) -> list[str]:
    """A folder of ours, its manifest last; without one where no base is known (a note says so)."""
    write_peft(portable, folder)
    if portable.manifest is None:
        return [UNVERIFIED]
    manifest = dataclasses.replace(
        portable.manifest, record=merged_record(portable.manifest.record, None, None)
    )
    numbers = sum(tensor.numel() for tensor in portable.tensors.values())
    card = model_card(manifest, options.name, numbers)
    (folder / CARD).write_text(card, encoding="utf-8")
    write_manifest(folder, manifest)
    return []


def is_folder(path: Path) -> bool:
    """Whether a path is an adapter's folder, ours or PEFT's."""
    return (path / WEIGHTS).is_file()
