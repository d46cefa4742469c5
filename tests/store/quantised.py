"""Bases in 4 bits for the tests of this room: loaded as the command line loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from sidepath.cli.bases import load_causal


def packed(folder: Path, dtype: str = "auto") -> Any:
    """The folder's causal model, packed into NF4 with double quantisation."""
    return load_causal(folder, dtype, "cpu", "nf4")


def plain(folder: Path, dtype: str = "auto") -> Any:
    """The folder's causal model as it is stored."""
    return load_causal(folder, dtype, "cpu")


def stored(model: nn.Module, folder: Path) -> Path:
    """A model's folder."""
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder
