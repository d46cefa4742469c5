"""Readers of whole checkpoints: two side by side (extract), and the base of a merge."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidepath.cli.bases import base_folder
from sidepath.combining.checkpoints import Pair
from sidepath.merging.base import load_base
from sidepath.store.configs import model_without_weights, quiet
from sidepath.store.peft_format import WEIGHTS
from sidepath.store.tensors import FLOATING
from tests.conftest import tiny_llama
from tests.fuzz.adapters import peft_files
from tests.fuzz.reader import Files, Reader, Refused, plain, tensors_in

MODEL = "model.safetensors"


def saved_model(seed: int, prefix: str) -> Files:
    base = tiny_llama()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with tempfile.TemporaryDirectory() as place:
        base.save_pretrained(place)  # type: ignore[operator]
        names = ("config.json", MODEL)
        return {f"{prefix}/{name}": Path(place, name).read_bytes() for name in names}


# Two checkpoints, as extract compares them


def pair_files() -> Files:
    return saved_model(1, "base") | saved_model(2, "tuned")


def read_pair(folder: Path) -> Any:
    base, tuned = (base_folder(str(folder / name)) for name in ("base", "tuned"))
    pair = Pair(model_without_weights(tuned, "auto"), base, tuned)
    found = {name: pair.difference(name) for name in pair}
    return plain({name: both[0] for name, both in found.items() if both is not None})


def pair_says(folder: Path) -> Any:
    base, tuned = (numbers_in(folder / name / MODEL) for name in ("base", "tuned"))
    if other_model(folder / "tuned"):
        return None
    wide = {torch.float64: torch.float64}
    differences = {}
    for name in tiny_llama().state_dict():
        if name in base and name in tuned:
            dtype = torch.promote_types(base[name].dtype, tuned[name].dtype)
            dtype = wide.get(dtype, torch.float32)
            differences[name] = tuned[name].to(dtype) - base[name].to(dtype)
    return plain(differences)


def other_model(folder: Path) -> bool:
    """Whether a config tells of another model: whose names they are is transformers' affair."""
    values = json.loads((folder / "config.json").read_bytes())
    named = values.get("architectures") == ["LlamaForCausalLM"]
    layers = values.get("num_hidden_layers", 32) == 2
    return not (named and layers) or bool(values.get("tie_word_embeddings"))


def numbers_in(path: Path) -> dict[str, Tensor]:
    return {
        name: torch.frombuffer(bytearray(data), dtype=FLOATING[dtype]).reshape(shape)
        for name, (dtype, shape, data) in tensors_in(path).items()
        if dtype in FLOATING and data
    }


# The base of a merge, as transformers maps it into memory


def merged_files() -> Files:
    files = saved_model(1, "base")
    return files | {f"adapter/{name}": data for name, data in peft_files().items()}


def read_merged(folder: Path) -> Any:
    quiet()
    place = base_folder(str(folder / "base"))
    if not (folder / "adapter" / WEIGHTS).is_file():
        raise Refused("no adapter")
    opened = load_base(place, [folder / "adapter"])
    if opened.fresh:
        raise Refused(f"it lacks {opened.fresh}")
    return plain(opened.model.state_dict())


def merged_says(folder: Path) -> Any:
    if other_model(folder / "base"):
        return None
    held = tensors_in(folder / "base" / MODEL)
    return {name: held[name] for name in tiny_llama().state_dict()}  # it may hold others too


READERS = (
    Reader("two checkpoints", pair_files, read_pair, pair_says),
    Reader("base of a merge", merged_files, read_merged, merged_says, share=0.5),
)
