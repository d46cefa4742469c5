"""FORMATS: every format that adapters are converted from and to, and the way between (floor 5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sidepath.convert import diffusers, folders, gguf_file, kohya, loralib, mlx
from sidepath.convert.based import on_base, on_names
from sidepath.convert.folders import OURS
from sidepath.convert.portable import Base, Options, Portable, read_adapter
from sidepath.convert.vllm import fitted
from sidepath.errors import ConfigError, StoreError
from sidepath.store import manifest as manifests
from sidepath.store.file import publish_file
from sidepath.store.folder import lists_all_files, names_in, publish
from sidepath.store.peft_format import CONFIG
from sidepath.store.saving import OWN_NAMES, merged_record, plain_peft
from sidepath.store.tensors import PICKLES, read_header, refuse_pickle


@dataclass(frozen=True)
class Format:
    """One format: how it is known, read and written."""

    recognises: Callable[[Path], bool]
    read: Callable[[Path, Options], Portable]
    write: Callable[[Portable, Path, Options], list[str]]
    """Writes into an empty folder, or to a file that is not there; returns notes."""
    folder: bool
    """Whether it is a folder; else one file."""


def _by_keys(known: Callable[[list[str]], bool]) -> Callable[[Path], bool]:
    return lambda path: path.is_file() and known(list(read_header(path)))


def _is_ours(path: Path) -> bool:
    return folders.is_folder(path) and (path / manifests.NAME).exists()


def _is_diffusers(path: Path) -> bool:
    file = path / diffusers.FILE if path.is_dir() else path
    return _by_keys(diffusers.is_diffusers)(file)


FORMATS: Mapping[str, Format] = {
    "sidepath": Format(_is_ours, read_adapter, folders.write_ours, folder=True),
    "peft": Format(folders.is_folder, read_adapter, folders.write_plain, folder=True),
    "mlx": Format(mlx.is_mlx, mlx.read, mlx.write, folder=True),
    "gguf": Format(gguf_file.is_gguf, gguf_file.read, gguf_file.write, folder=False),
    "kohya": Format(_by_keys(kohya.is_kohya), kohya.read, kohya.write, folder=False),
    "diffusers": Format(_is_diffusers, diffusers.read, diffusers.write, folder=False),
    "loralib": Format(_by_keys(loralib.is_loralib), loralib.read, loralib.write, folder=False),
}
"""In the order in which a path is held against them."""


@dataclass(frozen=True)
class Converted:
    """What a conversion came to."""

    source: str
    """The format that was read."""
    portable: Portable
    notes: tuple[str, ...]


def format_of(path: Path) -> str:
    """The format of a folder or file. Errors: `StoreError`, `DamagedAdapter`."""
    if not path.exists():
        raise StoreError("there is no such adapter", where=path)
    if path.is_file() and not gguf_file.is_gguf(path):
        refuse_pickle(path)
    for name, one in FORMATS.items():
        if one.recognises(path):
            return name
    raise StoreError(
        "the adapter is in no format that is known",
        where=path,
        found=names_in(path) if path.is_dir() else ", ".join(list(read_header(path))[:3]),
        expected=", ".join(FORMATS),
    )


def read(path: Path, options: Options, source: str | None = None) -> tuple[str, Portable]:
    """Read an adapter in the format `source`, found out where it is not given.

    Errors: `ConfigError` for an unknown name; those of the format's reader.
    """
    name = source or format_of(path)
    return name, _format(name).read(path, options)


def convert(
    source: Path,
    target: Path,
    to: str,
    *,
    source_format: str | None = None,
    options: Options | None = None,
    for_vllm: bool = False,
    overwrite: bool = False,
) -> Converted:
    """Write the adapter `source` as `target` in the format `to`, whole or not at all.

    Names and shapes are held against `options.base`; written as a folder of ours or PEFT's, the
    adapter gets its fingerprint. `for_vllm`: with one rank and one scale for all, as vLLM takes
    them. `source` is not changed.

    Errors: `StoreError` that names all that the format has no place for; `DamagedAdapter`,
    `WrongBase`, `ConfigError`, `MissingExtra`, `WriteFailed`.
    """
    chosen = _format(to)
    options = dataclasses.replace(options or Options(), name=target.name)
    _refuse_target(source, target, to, for_vllm)
    name, portable = read(source, options, source_format)
    notes = [*portable.notes, *_left_out(portable)]
    if options.base is not None:
        portable = _held_against(options.base, portable, chosen)
    if for_vllm:
        portable, more = fitted(portable)
        notes += more
    portable = _recorded(portable, name)
    publishing = (
        publish(target, manifests=(manifests.NAME,), replace=replaceable)
        if chosen.folder
        else publish_file(target, overwrite=overwrite)
    )
    with publishing as place:
        notes += chosen.write(portable, place, options)
    return Converted(name, portable, tuple(notes))


def _held_against(base: Base, portable: Portable, chosen: Format) -> Portable:
    """The adapter as it is written with its base known; refused if it cannot be that one's."""
    if chosen.write in (folders.write_ours, folders.write_plain):
        return on_base(portable, base)
    on_names(portable, base)
    return portable


def _refuse_target(source: Path, target: Path, to: str, for_vllm: bool) -> None:
    if for_vllm and to != "peft":
        raise ConfigError("vLLM reads PEFT's folders", found=to, expected="peft")
    if not _format(to).folder and target.name.lower().endswith(PICKLES):
        raise ConfigError(
            "the output's name is a pickle's, and what is written is none",
            where=target,
            hint="end it with .gguf" if to == "gguf" else "end it with .safetensors",
        )
    if source.resolve() == target.resolve():
        raise StoreError("an adapter is not written over the one it comes from", where=target)


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ConfigError("unknown format", found=name, expected=", ".join(FORMATS))
    return FORMATS[name]


def replaceable(folder: Path) -> bool:
    """Whether a folder holds an adapter, ours, PEFT's or mlx-lm's, and nothing else."""
    names = {path.name for path in folder.iterdir()}
    ours = lists_all_files(folder, (manifests.NAME,))
    return ours or plain_peft(folder) or names == {mlx.WEIGHTS, CONFIG}


def _recorded(portable: Portable, source: str) -> Portable:
    """The adapter with a word in its record on the format that it came from, unless it was ours."""
    if portable.manifest is None or source == OURS:
        return portable
    record = merged_record(portable.manifest.record, None, {"converted_from": source})
    manifest = dataclasses.replace(portable.manifest, record=record)
    return dataclasses.replace(portable, manifest=manifest)


def _left_out(portable: Portable) -> list[str]:
    """A note on files that were saved beside an adapter of ours and do not go with it."""
    if portable.manifest is None:
        return []
    more = [name for name in portable.manifest.files if name not in OWN_NAMES]
    return [f"left behind: {', '.join(more)}"] if more else []
