"""Every way in which Sidepath writes an adapter or a model, as it is failed and killed.

Each `Write` puts one of two outputs, "old" or "new", at `place / "out"`. They say the
same whenever they are made: what lies there is either one of them, nothing, or a mixture.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sidepath import Combination, Extraction, LoRA, combine, extract
from sidepath.convert.formats import convert
from sidepath.convert.portable import Base, Options
from sidepath.merging.merge import merge_folder
from sidepath.store.adapter import inject
from sidepath.store.configs import quiet
from tests.conftest import tiny_llama
from tests.fuzz.headers import split

NAMES = ("old", "new")
Contents = dict[str, bytes]


@dataclass(frozen=True)
class Sources:
    """What is written from: nothing changes it."""

    place: Path
    adapters: dict[str, Any]
    """Two adapters that stand on models."""
    base: Base


def sources(place: Path) -> Sources:
    """A base in two files, two adapters of it, in PEFT's format too, and two tuned checkpoints."""
    quiet()
    adapters = {}
    base = tiny_llama(layers=1)
    base.save_pretrained(place / "base", max_shard_size="30kB")  # type: ignore[operator]
    for seed, name in enumerate(NAMES):
        model = tiny_llama(layers=1)
        made = inject(model, LoRA(r=2, targets=("q_proj", "up_proj")), "a")
        moved(made.parameters(), seed)
        made.save(place / name)
        adapters[name] = made
        convert(place / name, place / f"{name}-peft", "peft")
        tuned = tiny_llama(layers=1)
        moved(tuned.parameters(), seed)
        tuned.save_pretrained(place / f"{name}-tuned")  # type: ignore[operator]
    return Sources(place, adapters, Base(base, place / "base"))


def moved(parameters: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def _save(given: Sources, name: str, out: Path) -> None:
    given.adapters[name].save(out)


def _merge(given: Sources, name: str, out: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merge_folder(given.place / "base", [given.place / name], out, skip_parity=True)


def _convert(to: str, given: Sources, name: str, out: Path) -> None:
    options = Options(base=given.base)
    convert(given.place / f"{name}-peft", out, to, options=options, overwrite=True)


def _combine(given: Sources, name: str, out: Path) -> None:
    weights = (1.0, 0.5) if name == "new" else (0.25, 1.0)
    combine([given.place / one for one in NAMES], out, Combination(weights=weights))


def _extract(given: Sources, name: str, out: Path) -> None:
    how = Extraction(r=2, targets=("q_proj", "up_proj"))
    extract(given.place / "base", given.place / f"{name}-tuned", out, how)


WRITES: dict[str, Callable[[Sources, str, Path], None]] = {
    "save": _save,
    "merge": _merge,
    **{
        f"convert to {to}": partial(_convert, to)
        for to in ("sidepath", "peft", "mlx", "gguf", "kohya", "diffusers", "loralib")
    },
    "combine": _combine,
    "extract": _extract,
}


class Target:
    """One place to write to, and what whole outputs are there."""

    def __init__(self, kind: str, given: Sources, place: Path) -> None:
        self.kind, self.given, self.place = kind, given, place
        place.mkdir()
        self.whole: dict[str, Contents] = {}
        for name in reversed(NAMES):  # the old one is there in the end
            self.write(name)
            self.whole[name] = contents(self.out)
        assert self.whole["old"] != self.whole["new"]

    @property
    def out(self) -> Path:
        return self.place / "out"

    def write(self, name: str) -> None:
        WRITES[self.kind](self.given, name, self.out)

    def state(self) -> str | None:
        """Which output lies there; None when there is none. A mixture is an `AssertionError`."""
        if not self.out.exists():
            return None
        found = contents(self.out)
        same = [name for name, whole in self.whole.items() if whole == found]
        assert same, f"{self.kind}: a mixture: {sorted(found)}"
        return same[0]

    def orphans(self) -> list[str]:
        """What lies beside the output."""
        return sorted(name for name in os.listdir(self.place) if name != "out")


def contents(out: Path) -> Contents:
    """What a file says, or every file of a folder."""
    if out.is_file():
        return {"": _said(out)}
    return {path.name: _said(path) for path in out.iterdir()}


def _said(path: Path) -> bytes:
    """A file's bytes, without what differs from one run to the next: the memory that it took, and
    the order of a safetensors file's metadata.
    """
    data = path.read_bytes()
    try:
        if path.name == "parity.json":
            values = json.loads(data)
            del values["peak_memory_bytes"]
            return json.dumps(values).encode()
        head, body = split(data)
        return json.dumps(json.loads(head), sort_keys=True).encode() + body
    except (ValueError, KeyError):
        return data
