"""Readers of what runs leave: checkpoints, parity, settings, the run table; and of bases."""

from __future__ import annotations

import hashlib
import json
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import torch

from sidepath import LoRA
from sidepath.cli.bases import base_folder
from sidepath.cli.runs import TrainRun
from sidepath.cli.settings import Settings, read_file
from sidepath.compare.runs import RunTable
from sidepath.config import TrainConfig, as_dict
from sidepath.store.configs import model_without_weights
from sidepath.store.fingerprint import checkpoint_files, fingerprint
from sidepath.store.loading import load_tensors
from sidepath.store.parity import read_parity
from sidepath.store.tensors import read_header
from sidepath.training import checkpoint
from sidepath.training.history import History, LayerHistory, read_history
from tests.conftest import tiny_llama
from tests.fuzz.reader import Files, Reader, Refused, plain, saved, tensors_in
from tests.store.quantised import packed, stored

# Checkpoints

STEP = "step-00000002"


def checkpoint_files_() -> Files:
    state = checkpoint.Checkpoint(
        2,
        {"model/a": torch.randn(4, 3), "optimizer/m/a": torch.zeros(4, 3)},
        {"best": 0.5},
        {"seed": 1},
    )
    with tempfile.TemporaryDirectory() as place:
        folder = checkpoint.save(Path(place), state, keep=1)
        return {f"{STEP}/{path.name}": path.read_bytes() for path in folder.iterdir()}


def resign_checkpoint(files: Files) -> Files:
    name, weights = f"{STEP}/checkpoint.json", f"{STEP}/tensors.safetensors"
    body = json.loads(files[name])
    body.pop("digest", None)
    if weights in files:
        body["files"]["tensors.safetensors"] = hashlib.sha256(files[weights]).hexdigest()
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return {**files, name: json.dumps({**body, "digest": digest}).encode()}


def read_checkpoint(folder: Path) -> Any:
    found, notices = checkpoint.latest(folder)
    if found is None or notices:
        raise Refused(f"no checkpoint {notices}")
    assert isinstance(found.progress, dict)
    assert isinstance(found.identity, dict)
    return plain(found.tensors), repr(found.progress), repr(found.identity)


def checkpoint_says(folder: Path) -> Any:
    body = json.loads((folder / STEP / "checkpoint.json").read_bytes())
    tensors = tensors_in(folder / STEP / "tensors.safetensors")
    return tensors, repr(body["progress"]), repr(body["identity"])


# parity.json, settings, the run table


def parity_files() -> Files:
    measured = {"max_abs": 1e-6, "mean_abs": 1e-7, "top1": 1.0, "kl": 0.0, "tolerance": 1e-4,
                "mean_tolerance": 1e-5, "effect": 0.5, "positions": 60}  # fmt: skip
    adapters = [{"name": "sql", "digest": "0" * 64}]
    return {"parity.json": json.dumps({**measured, "adapters": adapters, "files": {}}).encode()}


def read_parity_(folder: Path) -> Any:
    merged, parity = read_parity(folder / "parity.json")
    return merged, None if parity is None else repr(saved(parity.as_dict()))


def parity_says(folder: Path) -> Any:
    values = json.loads((folder / "parity.json").read_bytes())
    merged = {entry["digest"]: entry["name"] for entry in values["adapters"]}
    names = (
        "max_abs",
        "mean_abs",
        "top1",
        "kl",
        "tolerance",
        "mean_tolerance",
        "effect",
        "positions",
    )
    measured = None if values.get("skipped") is True else {name: values[name] for name in names}
    return merged, None if measured is None else repr(saved(measured))


def history_files() -> Files:
    layers = tuple(
        LayerHistory(f"layers.{n}.q_proj", None if n else (1.5, None), (0.5, 0.25), (1.0, 2.0))
        for n in range(2)
    )
    history = History(2, (2.0, 1.5, 1.25, 1.0), ((4, 1.125),), (2, 4), layers)
    return {"history.json": history.as_json().encode()}


def read_history_(folder: Path) -> Any:
    return saved(read_history(folder / "history.json").as_dict())


def history_says(folder: Path) -> Any:
    return saved(json.loads((folder / "history.json").read_bytes()))


TOML = b"""# a run
[run]
data = ["a.jsonl", "b.jsonl"]
output = "out"
max_tokens = 64
columns = { prompt = "question" }

[lora]
r = 4
alpha = 8.0
targets = ["q_proj", "v_proj"]
rank_pattern = { v_proj = 2 }

[train]
steps = 10
learning_rate = 2e-4
packing = true
"""
SECTIONS: dict[str, type] = {"run": TrainRun, "lora": LoRA, "train": TrainConfig}


def read_settings(folder: Path) -> Any:
    path = str(folder / "run.toml")
    settings = Settings(SECTIONS, read_file(path, SECTIONS, ()), {}, path)
    built: dict[str, Any] = {name: settings.build(name, cls) for name, cls in SECTIONS.items()}
    return saved({name: as_dict(one) for name, one in built.items()})


def settings_say(folder: Path) -> Any:
    tables = tomllib.loads((folder / "run.toml").read_text(encoding="utf-8"))
    known = {"run": TrainRun(data=("x",), output="x"), "lora": LoRA(), "train": TrainConfig()}
    cleared = {
        name: {key: None if value == "none" and _may_be_nothing(known[name], key) else value
               for key, value in tables.get(name, {}).items()}
        for name in known
    }  # fmt: skip
    return saved({name: {**as_dict(one), **cleared[name]} for name, one in known.items()})


def _may_be_nothing(config: Any, key: str) -> bool:
    return "None" in str(type(config).__dataclass_fields__[key].type)


def runs_files() -> Files:
    with tempfile.TemporaryDirectory() as place:
        with RunTable(Path(place)) as table:
            table.put("d1", {"a": 1}, {"metric": 0.5})
            table.put("d2", {"a": 2}, {"metric": 0.25})
            table._connection.execute("PRAGMA journal_mode=DELETE")
        return {"runs.sqlite": Path(place, "runs.sqlite").read_bytes()}


def read_runs(folder: Path) -> Any:
    with RunTable(folder) as table:
        return [table.get("d1"), table.get("d2"), len(table)]


def runs_say(folder: Path) -> Any:
    import sqlite3

    connection = sqlite3.connect(folder / "runs.sqlite")
    rows = dict(connection.execute("SELECT digest, result FROM trials").fetchall())
    count = connection.execute("SELECT COUNT(*) FROM trials").fetchone()[0]
    connection.close()
    return [json.loads(rows[key]) if key in rows else None for key in ("d1", "d2")] + [count]


# The base's folder


def base_files() -> Files:
    with tempfile.TemporaryDirectory() as place:
        tiny_llama().save_pretrained(place, max_shard_size="40KB")  # type: ignore[operator]
        return {path.name: path.read_bytes() for path in Path(place).iterdir()}


def read_base(folder: Path) -> Any:
    place = base_folder(str(folder))
    found: dict[str, Any] = {}
    for path in checkpoint_files(place):
        found |= plain(load_tensors(path, read_header(path)))
    shapes = {name: sample.shape for name, sample in fingerprint(place).samples.items()}
    assert {name: shape for name, (_, shape, _) in found.items()} == shapes
    return found


def base_says(folder: Path) -> Any:
    index = json.loads((folder / "model.safetensors.index.json").read_bytes())
    found: dict[str, Any] = {}
    for name in sorted(set(index["weight_map"].values())):
        found |= tensors_in(folder / name)
    return found


def packed_files() -> Files:
    with tempfile.TemporaryDirectory() as place:
        model = packed(stored(tiny_llama(), Path(place, "plain")))
        folder = stored(model, Path(place, "packed"))
        return {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}


def read_packed(folder: Path) -> Any:
    return fingerprint(base_folder(str(folder))).id


def config_files() -> Files:
    return {"config.json": base_files()["config.json"]}


def read_config(folder: Path) -> Any:
    base = model_without_weights(base_folder(str(folder)), "auto")
    embedding = base.get_input_embeddings()  # type: ignore[operator]
    layers = {name.split(".")[2] for name, _ in base.named_parameters() if ".layers." in name}
    return type(base).__name__, tuple(embedding.weight.shape), len(layers)


def config_says(folder: Path) -> Any:
    values = json.loads((folder / "config.json").read_bytes())
    if values.get("architectures") != ["LlamaForCausalLM"] or values.get("model_type") != "llama":
        return None  # another kind of model: its shapes are transformers' own affair
    known = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32} | values
    shape = (known["vocab_size"], known["hidden_size"])
    return "LlamaForCausalLM", shape, known["num_hidden_layers"]


READERS = (
    Reader(
        "checkpoint",
        checkpoint_files_,
        read_checkpoint,
        checkpoint_says,
        share=1.5,
        resign=resign_checkpoint,
    ),
    Reader("parity.json", parity_files, read_parity_, parity_says),
    Reader("history.json", history_files, read_history_, history_says, share=0.7, places=False),
    Reader("settings", lambda: {"run.toml": TOML}, read_settings, settings_say, places=False),
    Reader("run table", runs_files, read_runs, runs_say, share=0.5, writes=True, places=False),
    Reader("base", base_files, read_base, base_says, share=1.5),
    # What its numbers are is held against bitsandbytes by tests/store/test_packed.py.
    Reader("base in 4 bits", packed_files, read_packed, lambda folder: None),
    Reader("config.json", config_files, read_config, config_says),
)
