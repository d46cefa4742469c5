"""The settings of the verbs combine and extract (floor 7).

Nothing here may import torch: `sidepath --help` reads these classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sidepath.combining.recipe import Combination, Extraction


@dataclass(frozen=True, kw_only=True)
class CombineRun(Combination):
    """How `combine` makes one adapter of several."""

    base: str | None = field(default=None, metadata={"place": "base"})
    """Folder of the base; needed only where biases or modules trained whole are combined with
    weights that do not sum to 1. Of it, nothing else is read."""
    allow_other_base: bool = False
    """Combine adapters although their fingerprints say that they were made for different bases."""
    overwrite: bool = False
    """Replace the adapter that the output folder holds."""


@dataclass(frozen=True, kw_only=True)
class ExtractRun(Extraction):
    """How `extract` makes an adapter of two checkpoints."""

    overwrite: bool = False
    """Replace the adapter that the output folder holds."""
