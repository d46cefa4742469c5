"""The thin factors of a saved adapter, read from its folder or file without its base (floor 5).

Dimensions: R rank, I columns, O rows, G groups of a convolution, N parts of a fused projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from sidepath.analyse.spectrum import Factors
from sidepath.errors import ConfigError, DamagedAdapter, StoreError
from sidepath.methods.lora import LoRA
from sidepath.store import manifest as manifests
from sidepath.store.loading import load_file, load_tensors
from sidepath.store.loralib_format import FACTORS
from sidepath.store.peft_format import CONFIG, PAIRS, PREFIX, WEIGHTS
from sidepath.store.peft_reading import other_ranks, trusted_settings
from sidepath.store.tensors import TensorInfo, file_inside, read_header


def factors_of(place: Path, alpha: float | None = None) -> dict[str, Factors]:
    """Every low-rank update of an adapter, by module path.

    `place`: an adapter's folder, ours or PEFT's; or a safetensors file of loralib's names, whose
    `lora_alpha` is not in it and has to be given (its fused projections have N equal parts; its
    convolutions cannot be told from linear layers without the base, and are not understood).
    Digests, shapes and values are checked first.

    Errors: `StoreError` when there is no adapter or none with low-rank updates, `DamagedAdapter`
    with all faults, `ConfigError` for an alpha that is missing, or that the folder has itself.
    """
    if place.is_file():
        return _of_loralib(place, alpha)
    if not place.is_dir() or not (place / WEIGHTS).exists():
        raise StoreError(
            "the folder holds no adapter" if place.is_dir() else "there is no such adapter folder",
            where=place,
            expected=f"{WEIGHTS} and {CONFIG}",
        )
    if alpha is not None:
        raise ConfigError("the adapter's settings name its alpha", where=place, found=alpha)
    path = file_inside(place, WEIGHTS)
    header = read_header(path)
    scaling_of = _our_scalings(place) if manifests.is_ours(place) else _scalings(place, header)
    return updates_in(load_tensors(path, header), scaling_of, path)


def updates_in(
    tensors: Mapping[str, Tensor], scaling_of: Callable[[str], float], path: Path
) -> dict[str, Factors]:
    """The low-rank updates among the tensors of an adapter's file `path`, by module path.

    They share the tensors' storage. Errors: `DamagedAdapter` where A and B do not fit together,
    `StoreError` when there is none.
    """
    pairs = _pairs(tensors, PAIRS, path)
    found: dict[str, Factors] = {}
    faults = []
    for start, (A, B) in pairs.items():
        name = start.removeprefix(PREFIX)
        A_RI, B_OR = _matrices(A, B)
        faults += _misfits(name, A_RI, B_OR, parts=1)
        found[name] = Factors(A_RI, B_OR, 0.0 if faults else scaling_of(name))
    return _checked(found, faults, path)


def _of_loralib(path: Path, alpha: float | None) -> dict[str, Factors]:
    pairs = _pairs(load_file(path), (FACTORS,), path)
    if pairs and alpha is None:
        raise ConfigError(
            "the file does not hold the alpha that its updates are scaled by",
            where=path,
            expected="loralib's lora_alpha",
            hint="give it with --alpha",
        )
    found: dict[str, Factors] = {}
    faults = []
    for name, (A, B) in pairs.items():
        r = B.shape[1] if B.dim() == 2 else 0
        parts = len(A) // r if r else 0
        faults += _misfits(name, A, B, parts)
        sizes = (len(B) // parts,) * parts if parts > 1 else ()
        found[name] = Factors(A, B, 0.0 if faults else (alpha or 0.0) / r, sizes)
    return _checked(found, faults, path)


def _pairs(
    tensors: Mapping[str, Tensor], endings: tuple[tuple[str, ...], ...], path: Path
) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by the start of their names."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    lone = []
    for ends_A, ends_B in endings:
        for key in [key for key in tensors if key.endswith(ends_A)]:
            start = key.removesuffix(ends_A)
            if start + ends_B in tensors:
                found[start] = (tensors[key], tensors[start + ends_B])
            else:
                lone.append(f"{start}{ends_B}: missing")
    if lone:
        raise DamagedAdapter("an update lacks its B", where=path, faults=lone)
    return found


def _misfits(name: str, A_RI: Tensor, B_Or: Tensor, parts: int) -> list[str]:
    if not (A_RI.dim() == B_Or.dim() == 2):
        return [f"{name}: A {list(A_RI.shape)}, B {list(B_Or.shape)}, expected matrices"]
    if 0 in (*A_RI.shape, *B_Or.shape):
        return [f"{name}: rank {B_Or.shape[1]}, A {list(A_RI.shape)}, B {list(B_Or.shape)}"]
    if len(A_RI) != parts * B_Or.shape[1] or len(B_Or) % parts:
        return [f"{name}: A {list(A_RI.shape)}, B {list(B_Or.shape)}"]
    return []


def _checked(found: dict[str, Factors], faults: list[str], path: Path) -> dict[str, Factors]:
    if faults:
        raise DamagedAdapter("A and B do not fit together", where=path, faults=faults)
    if not found:
        raise StoreError("the adapter holds no low-rank update to look at", where=path)
    return found


def _matrices(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A convolution's tensors as the matrices they stand for; one group's A stands for all.

    What is no matrix at all is left as it is: `_misfits` tells.
    """
    if min(A.dim(), B.dim()) < 2:
        return A, B
    if A.dim() > 2 and B.shape[1]:
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


def _our_scalings(folder: Path) -> Callable[[str], float]:
    config = manifests.trusted_manifest(folder).config
    if not isinstance(config, LoRA):
        raise StoreError(f"{config.method} has no low-rank updates", where=folder)
    _refuse_dora(config.dora, folder)
    return config.scaling_of


def _scalings(folder: Path, header: Mapping[str, TensorInfo]) -> Callable[[str], float]:
    """Of a folder of PEFT's."""
    _, settings = trusted_settings(folder)
    _refuse_dora(settings.dora, folder)
    if faults := other_ranks(settings, header):
        raise DamagedAdapter("the factors do not fit the settings", where=folder, faults=faults)
    return settings.scaling_of
