"""The thin factors of a saved adapter, read from its folder without its base (floor 5).

Dimensions: R rank, I columns, O rows, G groups of a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from sidepath.analyse.spectrum import Factors
from sidepath.errors import DamagedAdapter, StoreError
from sidepath.methods.lora import LoRA
from sidepath.store import manifest as manifests
from sidepath.store.loading import load_tensors
from sidepath.store.peft_config import read_settings
from sidepath.store.peft_format import CONFIG, ENDINGS, PREFIX, WEIGHTS
from sidepath.store.tensors import file_inside, read_header, strict_json

_A_THEN_B = (ENDINGS[0:2], ENDINGS[2:4])
"""The endings of a pair's names: of linear layers and convolutions, of embeddings."""


def factors_of(folder: Path) -> dict[str, Factors]:
    """Every low-rank update of an adapter's folder, by module path.

    Digests, shapes and values are checked first. Errors: `StoreError` when the folder holds no
    adapter or none with low-rank updates, `DamagedAdapter` with all faults.
    """
    if not folder.is_dir() or not (folder / WEIGHTS).exists():
        raise StoreError(
            "the folder holds no adapter" if folder.is_dir() else "there is no such adapter folder",
            where=folder,
            expected=f"{WEIGHTS} and {CONFIG}",
        )
    scaling_of = _scalings(folder)
    path = file_inside(folder, WEIGHTS)
    tensors = load_tensors(path, read_header(path))
    found: dict[str, Factors] = {}
    for ends_A, ends_B in _A_THEN_B:
        for key in [key for key in tensors if key.endswith(ends_A)]:
            start = key.removesuffix(ends_A)
            if start + ends_B not in tensors:
                raise DamagedAdapter(
                    "an update lacks its B", where=path, faults=[f"{start}{ends_B}: missing"]
                )
            name = start.removeprefix(PREFIX)
            A_RI, B_OR = _matrices(tensors[key], tensors[start + ends_B])
            if A_RI.shape[0] != B_OR.shape[1]:
                raise DamagedAdapter(
                    "A and B do not fit together",
                    where=path,
                    faults=[f"{name}: A {list(A_RI.shape)}, B {list(B_OR.shape)}"],
                )
            found[name] = Factors(A_RI, B_OR, scaling_of(name))
    if not found:
        raise StoreError("the adapter holds no low-rank update to look at", where=folder)
    return found


def _matrices(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A convolution's tensors as the matrices they stand for; one group's A stands for all."""
    if A.dim() > 2:
        groups = max(1, A.shape[0] // B.shape[1])
        A = A[: A.shape[0] // groups, : A.shape[1] // groups]
    return A.flatten(1), B.flatten(1)


def _refuse_dora(dora: bool, folder: Path) -> None:
    if dora:
        raise StoreError(
            "DoRA's update of a matrix is no product of thin factors, and depends on the base",
            where=folder,
            hint="merge it, and compare the merged weights with the base's",
        )


def _scalings(folder: Path) -> Callable[[str], float]:
    if (folder / manifests.NAME).exists():
        manifest, faults = manifests.read_manifest(folder)
        if manifest is None or faults:
            raise DamagedAdapter("the adapter cannot be trusted", where=folder, faults=faults)
        if not isinstance(manifest.config, LoRA):
            raise StoreError(f"{manifest.config.method} has no low-rank updates", where=folder)
        _refuse_dora(manifest.config.dora, folder)
        return manifest.config.scaling_of
    try:
        values: Mapping[str, object] = strict_json(file_inside(folder, CONFIG).read_bytes())
    except ValueError as error:
        raise DamagedAdapter(f"{CONFIG} is not JSON", where=folder, found=error) from error
    settings, faults = read_settings(values)
    if faults:
        raise DamagedAdapter(f"{CONFIG} has faults", where=folder, faults=faults)
    _refuse_dora(settings.dora, folder)

    def scaling_at(path: str) -> float:
        rank = settings.rank_at(path)
        return settings.alpha_at(path) / (math.sqrt(rank) if settings.rslora else rank)

    return scaling_at
