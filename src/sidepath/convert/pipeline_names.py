"""How the text encoders of image pipelines are called in kohya's and diffusers' files (floor 5).

Both were made when CLIP's layers lay below `text_model.`, and keep that part of the name; today's
transformers has it no longer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from sidepath.convert.passport import Passport, paths_of
from sidepath.convert.portable import Options
from sidepath.errors import DamagedAdapter, StoreError
from sidepath.injection.architecture import modules_of

OLD = "text_model."
_CLIP = "encoder.layers."


@dataclass(frozen=True)
class Component:
    """One part of a pipeline, as diffusers and kohya call it."""

    diffusers: str
    kohya: str


COMPONENTS: Mapping[str, Component] = {
    "text_encoder": Component("text_encoder", "lora_te_"),
    "text_encoder_1": Component("text_encoder", "lora_te1_"),
    "text_encoder_2": Component("text_encoder_2", "lora_te2_"),
}
"""By the option's name; the numbered ones are those of pipelines with two text encoders."""


def spelled(path: str) -> str:
    """A module's path as such a file spells it."""
    return OLD + path if path.startswith(_CLIP) else path


def known_paths(options: Options, passport: Passport | None) -> list[str] | None:
    """The paths that a file's names can mean, from the base or the passport; None if unknown."""
    if options.base is not None:
        return [path for path, _ in modules_of(options.base.model)]
    return None if passport is None else list(paths_of(passport))


def own_tensors(
    tensors: Mapping[str, Tensor], prefix: str, where: object
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of one component without its prefix, and notes about what else is there.

    Errors: `StoreError` when the component has none.
    """
    own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    left = sorted({_first(key, prefix[-1]) for key in tensors if not key.startswith(prefix)})
    if not own:
        raise StoreError(
            f"the file holds no tensors of this component ({prefix}...)",
            where=where,
            found=", ".join(left[:5]) or "nothing",
            hint=f"give --component: one of {', '.join(COMPONENTS)}",
        )
    count = len(tensors) - len(own)
    note = f"{count} tensors of other components were left out ({', '.join(left[:5])})"
    return own, [note] if count else []


def _first(key: str, separator: str) -> str:
    return separator.join(key.split(separator)[: 2 if separator == "_" else 1])


def matched(names: Iterable[str], table: Mapping[str, list[str]], where: object) -> dict[str, str]:
    """The module path of each of a file's names.

    Errors: one `DamagedAdapter` with every name that means no module, or several, or one that
    another name means as well.
    """
    found: dict[str, str] = {}
    faults = []
    for name in names:
        paths = table.get(name, [])
        if len(paths) != 1:
            faults.append(f"{name}: means " + (" or ".join(paths) or "no module of the base"))
        elif paths[0] in found:
            faults.append(f"{name}: means {paths[0]}, and so does {found[paths[0]]}")
        else:
            found[paths[0]] = name
    if faults:
        raise DamagedAdapter("the file's names do not fit the base", where=where, faults=faults)
    return {name: path for path, name in found.items()}


def spellings(paths: Iterable[str], separator: str) -> dict[str, list[str]]:
    """Every way to spell each path, with its dots as `separator`, and the paths it can mean."""
    table: dict[str, list[str]] = {}
    for path in paths:
        for name in {path, spelled(path), path.removeprefix(OLD)}:
            table.setdefault(name.replace(".", separator), []).append(path)
    return table
