"""Readers of adapters: our folders, PEFT's, libraries, a file of loralib's."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import sidepath
from sidepath import LoRA
from sidepath.analyse import factors_of
from sidepath.combining.ingredients import read_all
from sidepath.config import as_dict
from sidepath.methods import METHODS
from sidepath.store.library import Library
from sidepath.store.loralib_format import load_loralib
from sidepath.store.peft_format import CONFIG, WEIGHTS, pack
from sidepath.store.plain_format import slots_of
from sidepath.store.saving import views_of
from tests.conftest import randomise, tiny_llama
from tests.fuzz.reader import Files, Reader, Refused, plain, saved, tensors_in

MANIFEST = "sidepath.json"


# Adapters of ours and of PEFT's

_model: nn.Module | None = None


def model() -> nn.Module:
    """The base that adapters are loaded onto: one for all cases, found unchanged after each."""
    global _model
    if _model is None:
        _model = tiny_llama()
    return _model


def own_files(config: Any = None, **more: Any) -> Files:
    base = tiny_llama()
    adapter = sidepath.inject(
        base,
        config or LoRA(r=2, targets=("q_proj", "v_proj"), rank_pattern={"v_proj": 1}),
        name="a",
        **more,
    )
    randomise(adapter.parameters())
    with tempfile.TemporaryDirectory() as place:
        folder = adapter.save(Path(place, "a"), metrics={"loss": 1.0}, record={"seed": 1})
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def plain_files() -> Files:
    return own_files(sidepath.Bottleneck())


def peft_files() -> Files:
    files = own_files(LoRA(r=2, alpha=4, targets=("q_proj", "v_proj")))
    return {name: files[name] for name in (WEIGHTS, CONFIG)}


def resign_manifest(files: Files) -> Files:
    """`sidepath.json` for the files as they are now, by the format's description."""
    values = json.loads(files[MANIFEST])
    for name, entry in values["files"].items():
        if name in files:
            entry |= {"size": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
    values.pop("digest", None)
    head = json.dumps(values, indent=2).removesuffix("\n}").encode() + b',\n  "digest": "'
    return {**files, MANIFEST: head + hashlib.sha256(head).hexdigest().encode() + b'"\n}\n'}


@contextmanager
def loaded(folder: Path) -> Iterator[Any]:
    """An adapter on the base, which afterwards holds nothing of it, however it ended."""
    base = model()
    names = list(base.state_dict())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapter = sidepath.load(base, folder, "a")
    except BaseException:
        assert list(base.state_dict()) == names, "the model was changed by a load that failed"
        raise
    try:
        yield adapter
    finally:
        sidepath.remove(base, "a")


def read_own(folder: Path) -> Any:
    with loaded(folder) as adapter:
        installed = adapter.installed
        slots = slots_of(installed, dict(adapter.model.named_modules()))
        tensors = plain(pack(installed.deltas, views_of(adapter.model, installed), slots))
        if not (folder / MANIFEST).exists():  # then it is a folder of PEFT's, and read as one
            return tensors
        return tensors, saved(as_dict(adapter.config)), saved(adapter.record)


def own_says(folder: Path) -> Any:
    if not (folder / MANIFEST).exists():
        return tensors_in(folder / WEIGHTS)
    values = json.loads((folder / MANIFEST).read_bytes())
    known = as_dict(METHODS[values["method"]]())
    return (
        tensors_in(folder / WEIGHTS),
        saved({**known, **values["config"]}),
        saved(values["record"]),
    )


def read_peft(folder: Path) -> Any:
    with loaded(folder) as adapter:
        deltas = adapter.deltas
        tensors = {
            f"base_model.model.{path}.lora_{letter}.weight": getattr(delta, letter)
            for path, delta in deltas.items()
            for letter in "AB"
        }
        return plain(tensors), {path: float(delta.scaling) for path, delta in deltas.items()}


def peft_says(folder: Path) -> Any:
    values = json.loads((folder / CONFIG).read_bytes())
    tensors = tensors_in(folder / WEIGHTS)
    paths = [name[17:-14] for name in tensors if name.endswith(".lora_A.weight")]
    return tensors, {path: scaling_at(values, path) for path in paths}


def scaling_at(values: Mapping[str, Any], path: str) -> float:
    """The scaling of an update by PEFT's settings."""
    r, alpha = values.get("r", 8), values.get("lora_alpha", 8)
    for name, patterns in (("r", "rank_pattern"), ("alpha", "alpha_pattern")):
        for pattern, value in (values.get(patterns) or {}).items():
            key = pattern.removeprefix("^").removesuffix("$").replace("\\", "")
            if path == key or (not pattern.startswith("^") and path.endswith("." + key)):
                r, alpha = (value, alpha) if name == "r" else (r, value)
                break
    return float(alpha / (math.sqrt(r) if values.get("use_rslora") else r))


def read_factors(folder: Path) -> Any:
    found = factors_of(folder)
    return {name: plain({"A": one.A_RI, "B": one.B_Or}) for name, one in sorted(found.items())}


def factors_say(folder: Path) -> Any:
    tensors = tensors_in(folder / WEIGHTS)
    ending = ".lora_A.weight"
    names = sorted(name for name in tensors if name.endswith(ending))
    return {
        name[:-len(ending)].removeprefix("base_model.model."): {
            "A": tensors[name], "B": tensors[name[:-len(ending)] + ".lora_B.weight"]
        }
        for name in names
    }  # fmt: skip


def read_ingredient(folder: Path) -> Any:
    (one,) = read_all([folder])
    scalings = {name: factors.scaling for name, factors in one.factors.items()}
    return plain(one.tensors), saved(one.settings), scalings


def ingredient_says(folder: Path) -> Any:
    tensors = tensors_in(folder / WEIGHTS)
    values = json.loads((folder / CONFIG).read_bytes())
    paths = [name[17:-14] for name in tensors if name.endswith(".lora_A.weight")]
    if not (folder / MANIFEST).exists():
        return tensors, saved(values), {path: scaling_at(values, path) for path in paths}
    config: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())["config"]
    settings: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in config.items()
    }
    said = LoRA(**settings)
    return tensors, saved(values), {path: said.scaling_of(path) for path in paths}


def read_library(folder: Path) -> Any:
    library = Library(folder.parent)
    if library.damaged or library.others:
        raise Refused(str([*library.damaged, *library.others]))
    (entry,) = library.values()
    return entry.numbers, entry.digest, saved(entry.metrics), entry.method


def library_says(folder: Path) -> Any:
    numbers = sum(math.prod(shape) for _, shape, _ in tensors_in(folder / WEIGHTS).values())
    if not (folder / MANIFEST).exists():
        return numbers, None, {}, "lora"
    values = json.loads((folder / MANIFEST).read_bytes())
    metrics = values["record"].get("metrics")
    digest = values["files"][WEIGHTS]["sha256"]
    return numbers, digest, saved(metrics if isinstance(metrics, dict) else {}), values["method"]


# A file of loralib's


def loralib_files() -> Files:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        path = f"model.layers.{layer}.self_attn.q_proj"
        tensors[f"{path}.lora_A"] = torch.randn(2, 32, generator=generator)
        tensors[f"{path}.lora_B"] = torch.randn(32, 2, generator=generator)
    with tempfile.TemporaryDirectory() as place:
        save_file(tensors, Path(place, "lora.safetensors"))
        return {"lora.safetensors": Path(place, "lora.safetensors").read_bytes()}


def read_loralib(folder: Path) -> Any:
    base = model()
    names = list(base.state_dict())
    try:
        adapter = load_loralib(base, folder / "lora.safetensors", alpha=4, name="a")
    except BaseException:
        assert list(base.state_dict()) == names, "the model was changed by a load that failed"
        raise
    try:
        tensors = {
            f"{path}.lora_{letter}": getattr(delta, letter)
            for path, delta in adapter.deltas.items()
            for letter in "AB"
        }
        return plain(tensors)
    finally:
        sidepath.remove(base, "a")


def loralib_says(folder: Path) -> Any:
    return tensors_in(folder / "lora.safetensors")


OURS: dict[str, Any] = {"resign": resign_manifest}
READERS = (
    Reader("our adapter", own_files, read_own, own_says, share=3, **OURS),
    Reader("our adapter, plain", plain_files, read_own, own_says, **OURS),
    Reader("library", own_files, read_library, library_says, share=1.5, **OURS),
    Reader("PEFT folder", peft_files, read_peft, peft_says, share=2),
    Reader("inspect", peft_files, read_factors, factors_say, share=1.5),
    Reader("combine", own_files, read_ingredient, ingredient_says, **OURS),
    Reader("combine, PEFT's", peft_files, read_ingredient, ingredient_says),
    Reader("loralib file", loralib_files, read_loralib, loralib_says, share=1.5, places=False),
)
