"""`sidepath merge` of a synthetic Llama of 2 GB in 8 shards: seconds against `cp -r`, peak memory.

Random bfloat16 weights and random LoRA factors (r=16) are written to a temporary folder, for three
adapters: one layer's `q_proj` (nearly all of the base is untouched), `q_proj` and `v_proj`, and all
linear layers. Each round copies the base and merges each adapter, in turn, in a process of its own;
the cache is warm. `cp` alone leaves its bytes in memory, a published folder is on the disk: both
figures of `cp` are there. Then every tensor is read again: untouched ones to the bit, and
of touched ones every fourth against float64.

    python benchmarks/merge_large.py [--blocks 20] [--rounds 3] [--parity] [--only "all linear"]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common import machine, show

RANK, SCALING, SHARDS = 16, 2.0, 8
EACH = 4
"""Of the touched tensors one in so many is computed in float64."""
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_base(folder: Path, blocks: int) -> dict[str, tuple[int, ...]]:
    """A sharded checkpoint, one tensor in memory at a time; its tensors' shapes."""
    import transformers

    settings = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=blocks, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=32000, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(settings)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    settings.save_pretrained(folder)
    total = sum(torch.Size(shape).numel() for shape in shapes.values()) * 2
    torch.manual_seed(0)
    where: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    size, number = 0, 1
    for name, shape in shapes.items():
        shard[name] = torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.03, 0.03)
        if name.endswith("norm.weight"):
            shard[name].add_(1)
        size += shard[name].nbytes
        if size >= total / SHARDS or name == list(shapes)[-1]:
            file = f"model-{number:05}-of-{SHARDS:05}.safetensors"
            save_file(shard, folder / file, {"format": "pt"})
            where |= dict.fromkeys(shard, file)
            shard, size, number = {}, 0, number + 1
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return shapes


def make_adapter(folder: Path, shapes: dict[str, tuple[int, ...]], names: list[str]) -> Path:
    """Random factors beside these weights, in PEFT's form."""
    folder.mkdir()
    tensors = {}
    for name in names:
        rows, columns = shapes[name]
        start = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{start}.lora_A.weight"] = torch.randn(RANK, columns) * 0.02
        tensors[f"{start}.lora_B.weight"] = torch.randn(rows, RANK) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors")
    paths = [name.removesuffix(".weight") for name in names]
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": SCALING * RANK}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": paths}))
    return folder


def copied(base: Path, out: Path) -> tuple[float, float]:
    """Seconds of `cp -r`, and with its bytes on the disk."""
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(base), str(out)], check=True)
    middle = time.perf_counter()
    for path in out.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return middle - began, time.perf_counter() - began


def merged(base: Path, adapter: Path, out: Path, parity: bool) -> dict[str, Any]:
    """One merge in a fresh process: its seconds and peaks."""
    words = [sys.executable, __file__, "--child", str(base), str(adapter), str(out)]
    process = subprocess.Popen(
        [*words, *(["--parity"] if parity else [])], stdout=subprocess.PIPE, text=True
    )
    anonymous = [0]
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(process.pid, anonymous, done))
    watch.start()
    assert process.stdout is not None
    text = process.stdout.read()
    done.set()
    watch.join()
    assert process.wait() == 0
    return {**json.loads(text), "anonymous_peak_bytes": anonymous[0]}


def _watch(process: int, found: list[int], done: threading.Event) -> None:
    """The most private memory, looked at every 5 ms."""
    while not done.wait(0.005):
        try:
            text = Path(f"/proc/{process}/status").read_text()
        except OSError:
            return
        lines = (line.split() for line in text.splitlines())
        now = {words[0]: int(words[1]) * 1024 for words in lines if words[0] == "RssAnon:"}
        found[0] = max(found[0], now.get("RssAnon:", 0))


def child(base: str, adapter: str, out: str, parity: bool) -> None:
    """Merge, and say how long it took once everything was imported."""
    import warnings

    import transformers  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    from sidepath.merging.merge import merge_folder
    from sidepath.merging.peak import peak_bytes

    warnings.simplefilter("ignore")
    imported = peak_bytes()
    began = time.perf_counter()
    found = merge_folder(base, [adapter], out, skip_parity=not parity)
    seconds = time.perf_counter() - began
    peaks = {"imports_bytes": imported, "rss_peak_bytes": found.peaks["merge"]}
    print(json.dumps({"seconds": seconds, **peaks, **found.as_dict()}))


def compared(base: Path, adapter: Path, out: Path) -> dict[str, int]:
    """Tensors that are equal to the bit; and of those that are touched, one in `EACH` is held
    against `W0 + s B A` in float64, rounded once.
    """
    factors = load_file(adapter / "adapter_model.safetensors")
    found = {"untouched_equal": 0, "untouched_differ": 0, "touched": 0, "numbers": 0, "off": 0}
    found |= {"looked_at": 0, "further_than_next": 0}
    for (name, before), (other, after) in zip(_tensors(base), _tensors(out), strict=True):
        assert name == other
        start = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{start}.lora_A.weight" not in factors:
            same = torch.equal(before.view(torch.int16), after.view(torch.int16))
            found["untouched_equal" if same else "untouched_differ"] += 1
            continue
        found["touched"] += 1
        if found["touched"] % EACH != 1:
            continue
        A, B = (factors[f"{start}.lora_{part}.weight"].double() for part in "AB")
        exact = before.double() + SCALING * (B @ A)
        off = exact.bfloat16() != after
        found["looked_at"] += 1
        found["numbers"] += after.numel()
        found["off"] += int(off.sum())
        step = torch.finfo(torch.bfloat16).eps * exact[off].abs()
        found["further_than_next"] += int(((after[off].double() - exact[off]).abs() > step).sum())
    return found


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name)


def measured(place: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All rounds; medians of the seconds, the largest of the peaks."""
    base = place / "base"
    base.mkdir()
    shapes = make_base(base, arguments.blocks)
    weights = [name for name in shapes if name.split(".")[-2] in LINEAR]
    targets = {
        "one q_proj": ["model.layers.0.self_attn.q_proj.weight"],
        "q_proj, v_proj": [name for name in weights if "q_proj" in name or "v_proj" in name],
        "all linear": weights,
    }
    adapters = {
        name: make_adapter(place / f"adapter{number}", shapes, names)
        for number, (name, names) in enumerate(targets.items())
        if arguments.only in name
    }
    out = place / "out"
    copies, runs, checks = [], {name: [] for name in adapters}, {}
    for number in range(arguments.rounds):
        copies.append(copied(base, out))
        shutil.rmtree(out)
        for name, adapter in adapters.items():
            runs[name].append(merged(base, adapter, out, arguments.parity))
            if number == arguments.rounds - 1 and not arguments.unchecked:
                checks[name] = compared(base, adapter, out)
            shutil.rmtree(out)
    cp, synced = (statistics.median(one) for one in zip(*copies, strict=True))
    largest = max(torch.Size(shape).numel() for shape in shapes.values()) * 2
    return {
        "base_bytes": sum(path.stat().st_size for path in base.glob("*.safetensors")),
        "largest_tensor_bytes": largest,
        "bound_bytes": 4 * largest + 300 * 2**20,
        "cp_seconds": cp,
        "cp_on_disk_seconds": synced,
        "merges": {name: _summary(rows, cp, synced) for name, rows in runs.items()},
        "compared": checks,
        "machine": machine(),
    }


def _summary(rows: list[dict[str, Any]], cp: float, synced: float) -> dict[str, Any]:
    seconds = statistics.median(row["seconds"] for row in rows)
    largest = ("rss_peak_bytes", "anonymous_peak_bytes", "imports_bytes")
    return {
        "seconds": seconds,
        "over_cp": seconds / cp,
        "over_cp_on_disk": seconds / synced,
        **{name: max(row[name] for row in rows) for name in largest},
        "parity_peak_bytes": rows[-1]["peak_memory_bytes"]["parity"],
        "parity": rows[-1]["parity"],
    }


def _told(name: str, one: dict[str, Any], checked: dict[str, int] | None) -> str:
    """One adapter's merges in a line."""
    parts = [
        f"{name}: {one['seconds']:.2f} s, {one['over_cp']:.2f} of cp, "
        f"{one['over_cp_on_disk']:.2f} of cp on disk, peak {one['rss_peak_bytes'] / 2**20:.0f} MiB"
    ]
    if one["parity"] is not None:
        parity, peak = one["parity"], one["parity_peak_bytes"] / 2**20
        parts.append(
            f"parity max {parity['max_abs']:.2e} of {parity['tolerance']:.2e} allowed, mean "
            f"{parity['mean_abs']:.2e}, same top token {parity['top1']:.4f}, the adapter moves "
            f"{parity['effect']:.2e}, peak {peak:.0f} MiB"
        )
    if checked is not None:
        parts.append(
            f"{checked['untouched_equal']} untouched tensors equal to the bit, "
            f"{checked['untouched_differ']} not; {checked['touched']} touched, of which "
            f"{checked['looked_at']} held against float64: {checked['off']:,} of "
            f"{checked['numbers']:,} numbers the other neighbour, "
            f"{checked['further_than_next']} further off"
        )
    return "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parity", action="store_true")
    parser.add_argument("--unchecked", action="store_true")
    parser.add_argument("--only", default="", help="adapters whose name contains this")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child, arguments.parity)
        return
    with tempfile.TemporaryDirectory() as place:
        found = measured(Path(place), arguments)
    lines = [_told(name, one, found["compared"].get(name)) for name, one in found["merges"].items()]
    show(found, *lines)


if __name__ == "__main__":
    main()
