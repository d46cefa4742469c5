"""Readers of adapters in other tools' formats: those of `sidepath convert`.

Each format twice: a file of ours, whose passport says what the adapter was; and somebody else's,
whose names and shapes the base tells. Held against the file are the updates themselves, ΔW = s B A
in float64: alphas and ranks may be said in many ways.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sidepath
from sidepath import LoRA
from sidepath.convert.formats import convert, read
from sidepath.convert.portable import Base, Options, Portable
from sidepath.store.peft_format import CONFIG, WEIGHTS
from sidepath.store.tensors import FLOATING
from tests.conftest import randomise, tiny_llama
from tests.fuzz.adapters import MANIFEST, model, own_files, resign_manifest
from tests.fuzz.adapters import scaling_at as peft_scaling
from tests.fuzz.gguf import PASSPORT, numbers_in, put_together, taken_apart
from tests.fuzz.headers import joined, split
from tests.fuzz.mutators import written
from tests.fuzz.reader import Files, Reader, plain, saved, tensors_in

Array = np.ndarray[Any, Any]
Factors = Iterator[tuple[str, float, Array, Array]]
"""Of each update: path, scaling, A (R, I), B (O, R)."""
ALPHA = 4.0
"""Told with files of loralib's that have no word for it."""
DIFFUSERS = "pytorch_lora_weights.safetensors"
NAMES = {
    "gguf": "a.gguf",
    "kohya": "kohya.safetensors",
    "diffusers": DIFFUSERS,
    "loralib": "loralib.safetensors",
}
ENDING = ".lora_A.weight"


@dataclass(frozen=True, eq=False)
class Change:
    """An update ΔW; two are equal where no number differs by more than float32 rounds."""

    matrix: Array

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Change)
        most = 1e-5 * float(np.abs(self.matrix).max(initial=0.0))
        same = self.matrix.shape == other.matrix.shape
        return same and bool(np.abs(self.matrix - other.matrix).max(initial=0.0) <= most)


def changes(factors: Factors) -> dict[str, Change]:
    return {path: Change(scaling * (B @ A)) for path, scaling, A, B in factors}


# What is read


def base() -> Base:
    return Base(model())


def converted(to: str) -> Files:
    """An adapter of several ranks and alphas, in another format."""
    config = LoRA(
        r=2, alpha=4, targets=("q_proj", "v_proj", "down_proj"), dropout=0.25,
        rank_pattern={"v_proj": 1}, alpha_pattern={"down_proj": 3},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        adapter = sidepath.inject(tiny_llama(), config, name="a")
        randomise(adapter.parameters())
        folder = adapter.save(Path(place, "a"), record={"seed": 1})
        target = Path(place, NAMES.get(to, "folder"))
        convert(folder, target, to, options=Options(base=base()))
        found = [target] if target.is_file() else target.iterdir()
        return {path.name: path.read_bytes() for path in found}


def foreign(to: str) -> Files:
    """The same without what only we write: as another tool would have."""
    files = converted(to)
    for name, data in files.items():
        if name.endswith(".gguf"):
            parts = taken_apart(data)
            parts.keys = [one for one in parts.keys if one[0] != PASSPORT]
            files[name] = put_together(parts)
        elif name.endswith(".json"):
            values = json.loads(data)
            del values["sidepath"]
            files[name] = written(values)
        elif to != "mlx":
            head, body = split(data)
            entries = json.loads(head)
            for key in ("sidepath", "lora_alpha"):
                entries["__metadata__"].pop(key, None)
            files[name] = joined(written(entries), body)
    return files


def understood(portable: Portable) -> Any:
    """An adapter's updates; with a manifest its settings and record too."""
    found = changes(
        (path, one.scaling, one.A.double().numpy(), one.B.double().numpy())
        for path, one in portable.updates().items()
    )
    if portable.manifest is None:
        return found, saved(portable.values.get("lora_dropout", 0.0))
    return found, saved(portable.values), saved(portable.manifest.record)


def reading(place: str | None, options: Callable[[], Options]) -> Callable[[Path], Any]:
    """The reader of a file in the case's folder, or of the folder, its format found out."""
    return lambda folder: understood(read(folder / place if place else folder, options())[1])


# What is written there


def array(entry: tuple[str, tuple[int, ...], bytes]) -> Array:
    dtype, shape, data = entry
    if not data:
        return np.zeros(shape)
    numbers = torch.frombuffer(bytearray(data), dtype=FLOATING[dtype])
    found: Array = numbers.double().numpy().reshape(shape)
    return found


def arrays_in(path: Path) -> dict[str, Array]:
    return {name: array(entry) for name, entry in tensors_in(path).items()}


def metadata_in(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(split(path.read_bytes())[0]).get("__metadata__") or {}
    return found


def said_by(passport: Any, factors: Factors) -> Any:
    """What a file of ours says: the updates that it holds, the settings of its passport."""
    manifest = passport["manifest"]
    record = () if manifest is None else (saved(manifest["record"]),)
    values = saved(passport["adapter_config"])
    if manifest is None:
        values = values.get("lora_dropout", 0.0)
    return changes(factors), values, *record


def paths_in(passport: Any) -> list[str]:
    return [
        key.removeprefix("base_model.model.").removesuffix(ENDING)
        for key in passport["tensors"]
        if key.endswith(ENDING)
    ]


@cache
def paths_of_base() -> list[str]:
    return [path for path, module in model().named_modules() if type(module).__name__ == "Linear"]


def mlx_says(folder: Path) -> Any:
    values = json.loads((folder / CONFIG).read_bytes())
    settings = values["lora_parameters"]
    held = arrays_in(folder / "adapters.safetensors")
    names = [name.removesuffix(".lora_a") for name in held if name.endswith(".lora_a")]
    factors = (
        (name, float(settings["scale"]), held[f"{name}.lora_a"].T, held[f"{name}.lora_b"].T)
        for name in names
    )
    if "sidepath" in values:
        return said_by(values["sidepath"], factors)
    return changes(factors), saved(settings.get("dropout", 0.0))


LLAMA_CPP = {
    "attn_q": "self_attn.q_proj",
    "attn_v": "self_attn.v_proj",
    "ffn_down": "mlp.down_proj",
}


def halves_of_pairs(B: Array, heads: int) -> Array:
    """Slow reference: of a head's rows those at even places, then those at odd ones."""
    size = len(B) // heads
    order = [
        head * size + 2 * j + half
        for head in range(heads)
        for half in range(2)
        for j in range(size // 2)
    ]
    return B[order]


def gguf_says(folder: Path) -> Any:
    keys, held = numbers_in((folder / NAMES["gguf"]).read_bytes())
    ours = PASSPORT in keys

    def factors() -> Factors:
        for name in [name for name in held if name.endswith(".lora_a")]:
            start = name.removesuffix(".lora_a")
            _, block, kind, _ = start.split(".")
            A, B = held[name], held[f"{start}.lora_b"]
            if kind == "attn_q":
                B = halves_of_pairs(B, keys["llama.attention.head_count"] if ours else 4)
            alpha = keys.get("adapter.lora.alpha", 0.0)
            scaling = alpha / len(A) if alpha else 1.0
            yield f"model.layers.{int(block)}.{LLAMA_CPP[kind]}", scaling, A, B

    if not ours:
        return changes(factors()), 0.0
    passport = json.loads(keys[PASSPORT])
    # Its names are translated by the gguf package, which knows those of other models too.
    known = set(paths_in(passport)) <= set(paths_of_base())
    return said_by(passport, factors()) if known else None


def kohya_says(folder: Path) -> Any:
    path = folder / NAMES["kohya"]
    held, text = arrays_in(path), metadata_in(path).get("sidepath")
    passport = None if text is None else json.loads(text)
    paths = paths_of_base() if passport is None else paths_in(passport)

    def factors() -> Factors:
        for name in paths:
            start = "lora_te_" + name.replace(".", "_")
            if f"{start}.lora_down.weight" in held:
                A, B = held[f"{start}.lora_down.weight"], held[f"{start}.lora_up.weight"]
                alpha = held.get(f"{start}.alpha")
                yield name, 1.0 if alpha is None else float(alpha.ravel()[0]) / len(A), A, B

    return (changes(factors()), 0.0) if passport is None else said_by(passport, factors())


def diffusers_says(folder: Path) -> Any:
    path = folder / DIFFUSERS
    held, metadata = arrays_in(path), metadata_in(path)
    text, start = metadata.get("lora_adapter_metadata"), "text_encoder."
    said = {} if text is None else json.loads(text)
    own = {k.removeprefix(start): v for k, v in said.items() if k.startswith(start)}

    def factors() -> Factors:
        for key in [key for key in held if key.startswith(start) and key.endswith(ENDING)]:
            name = key.removeprefix(start).removesuffix(ENDING)
            A, B = held[key], held[start + name + ".lora_B.weight"]
            alpha = held.get(f"{start}{name}.alpha")
            scaling = peft_scaling(own, name) if own else 1.0
            yield name, scaling if alpha is None else float(alpha.ravel()[0]) / len(A), A, B

    if "sidepath" in metadata:
        return said_by(json.loads(metadata["sidepath"]), factors())
    return changes(factors()), saved(own.get("lora_dropout", 0.0))


def loralib_says(folder: Path) -> Any:
    path = folder / NAMES["loralib"]
    held, metadata = arrays_in(path), metadata_in(path)
    alphas: Mapping[str, float] = json.loads(metadata.get("lora_alpha", "{}"))

    def factors() -> Factors:
        for key in [key for key in held if key.endswith(".lora_A")]:
            name = key.removesuffix(".lora_A")
            A, B = held[key], held[f"{name}.lora_B"]
            alpha = alphas[name] if "sidepath" in metadata else ALPHA
            yield name, alpha / B.shape[1], A, B

    if "sidepath" in metadata:
        return said_by(json.loads(metadata["sidepath"]), factors())
    return changes(factors()), 0.0


# Folders of ours and PEFT's, as convert reads them: without a base


def read_folder(folder: Path) -> Any:
    portable = read(folder, Options())[1]
    record = None if portable.manifest is None else saved(portable.manifest.record)
    return plain(portable.tensors), saved(portable.values), record


def folder_says(folder: Path) -> Any:
    ours = (folder / MANIFEST).exists()
    record = json.loads((folder / MANIFEST).read_bytes())["record"] if ours else None
    values = json.loads((folder / CONFIG).read_bytes())
    return tensors_in(folder / WEIGHTS), saved(values), record if record is None else saved(record)


SAYS: dict[str, Callable[[Path], Any]] = {
    "mlx": mlx_says,
    "gguf": gguf_says,
    "kohya": kohya_says,
    "diffusers": diffusers_says,
    "loralib": loralib_says,
}


def both(name: str, says: Callable[[Path], Any]) -> Iterator[Reader]:
    place = NAMES.get(name)
    ours, theirs = reading(place, Options), reading(place, lambda: Options(base(), ALPHA))
    more: dict[str, Any] = {"places": place is None}
    yield Reader(f"{name} of ours", lambda: converted(name), ours, says, share=0.8, **more)
    yield Reader(f"{name} of others", lambda: foreign(name), theirs, says, share=0.8, **more)


READERS = (
    *(reader for name, says in SAYS.items() for reader in both(name, says)),
    # diffusers calls its one file so, in a folder that is given.
    Reader(
        "diffusers' folder",
        lambda: foreign("diffusers"),
        lambda folder: understood(read(folder, Options(), "diffusers")[1]),
        diffusers_says,
        share=0.4,
    ),
    Reader(
        "convert's folder", own_files, read_folder, folder_says, share=0.6, resign=resign_manifest
    ),
)
