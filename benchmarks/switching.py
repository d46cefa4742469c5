"""Putting adapters in, loading, switching and merging, against PEFT's, interleaved in one process.

Random Llamas of 32 layers (224 linear layers), LoRA r=8 on all of them, two threads. Narrow ones
for injecting, where Python is what costs; 512 wide ones for loading (10 MB an adapter) and for
merging. Ratios first; the absolute times belong to the machine named beside them.

    python benchmarks/switching.py [--rounds 9] [--many 100] [--only inject load activate merge]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sidepath
from common import interleaved, machine, markdown, ratios, show
from sidepath import LoRA
from sidepath.injection.registry import require_registry

CONFIG = LoRA(r=8, alpha=16, targets=("all-linear",))
Seconds = dict[str, list[float]]


def llama(width: int, dtype: torch.dtype = torch.float32, layers: int = 32) -> torch.nn.Module:
    """A random Llama with seven linear layers a block."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=43 * width // 16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=512,
    )
    return LlamaForCausalLM(config).to(dtype)


def with_peft(model: torch.nn.Module) -> Any:
    """PEFT's adapter of the same shape."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)  # type: ignore[arg-type]


def injecting(rounds: int) -> dict[str, Seconds]:
    """Fresh models each round; making them is not counted."""
    fresh = {who: [llama(64) for _ in range(rounds + 2)] for who in ("ours", "peer")}
    seconds = interleaved(
        {
            "ours": lambda: sidepath.inject(fresh["ours"].pop(), CONFIG),
            "peer": lambda: with_peft(fresh["peer"].pop()),
        },
        rounds=rounds,
    )
    return {"inject on 224 linears": seconds}


def saved(model: torch.nn.Module, folder: Path) -> Path:
    """A trained adapter's folder, made on the model it is then taken off."""
    adapter = sidepath.inject(model, CONFIG, "saved")
    for parameter in adapter.parameters():
        parameter.data.normal_(std=0.01)
    adapter.save(folder)
    sidepath.remove(model, "saved")
    return folder


def next_name(start: int = 0) -> Callable[[], str]:
    """A new adapter name at each call."""
    numbers = iter(range(start, 10_000))
    return lambda: f"a{next(numbers)}"


def loading(rounds: int, many: int) -> dict[str, Seconds]:
    """Each load goes onto models that hold one adapter, then `many`; PEFT reads the same folder."""
    model = llama(512)
    folder = saved(model, Path(tempfile.mkdtemp()) / "adapter")
    peer, name, peers_name = with_peft(llama(512)), next_name(), next_name()
    sidepath.load(model, folder, name())
    ours = {"ours": lambda: sidepath.load(model, folder, name())}
    both = {**ours, "peer": lambda: peer.load_adapter(str(folder), adapter_name=peers_name())}
    figures = {"load with 1 loaded": interleaved(both, rounds=rounds)}
    while len(require_registry(model).adapters) < many:
        sidepath.load(model, folder, name())
    figures[f"load with {many} loaded"] = interleaved(ours, rounds=rounds)
    return figures


def activating(rounds: int, many: int) -> dict[str, Seconds]:
    """From one adapter to another, with 2, 10 and `many` loaded (PEFT: 2 and 10)."""
    model, peer = llama(64), with_peft(llama(64))
    count, figures = 0, {}
    peers = {"default"}
    for loaded in sorted({2, 10, many}):
        while count < loaded:
            sidepath.inject(model, CONFIG, f"a{count}")
            count += 1
        while len(peers) < min(loaded, 10):
            peers.add(f"a{len(peers)}")
            peer.add_adapter(f"a{len(peers) - 1}", peer.peft_config["default"])
        turns = {"ours": 0, "peer": 0}

        def ours(turns: dict[str, int] = turns) -> None:
            turns["ours"] += 1
            sidepath.activate(model, f"a{turns['ours'] % 2}")

        def theirs(turns: dict[str, int] = turns) -> None:
            turns["peer"] += 1
            peer.set_adapter("default" if turns["peer"] % 2 else "a1")

        both = {"ours": ours, "peer": theirs} if loaded <= 10 else {"ours": ours}
        figures[f"activate with {loaded} loaded"] = interleaved(both, rounds=rounds)
    return figures


def merging(rounds: int) -> dict[str, Seconds]:
    """One merged adapter for another, against a copy of the weights that change."""
    figures = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = llama(512, dtype)
        for name in ("a", "b"):
            adapter = sidepath.inject(model, CONFIG, name)
            for parameter in adapter.parameters():
                parameter.data.normal_(std=0.01)
        weights = [model.get_parameter(f"{path}.weight").detach() for path in adapter.deltas]
        memory = [torch.empty_like(weight) for weight in weights]
        sidepath.merge(model, "a")
        turns = iter("ba" * 1000)

        def swap(
            keep: bool, model: torch.nn.Module = model, turns: Any = turns
        ) -> Callable[[], None]:
            def run() -> None:
                sidepath.unmerge(model, keep=keep)
                sidepath.merge(model, next(turns))

            return run

        def clone(weights: list[torch.Tensor] = weights) -> list[torch.Tensor]:
            return [torch.clone(weight) for weight in weights]

        def copy(
            weights: list[torch.Tensor] = weights, memory: list[torch.Tensor] = memory
        ) -> None:
            for own, weight in zip(memory, weights, strict=True):
                own.copy_(weight)

        short = str(dtype).removeprefix("torch.")
        figures[f"merged swap, new memory / clone, {short}"] = interleaved(
            {"ours": swap(False), "base": clone}, rounds=rounds
        )
        sidepath.unmerge(model, keep=True)
        sidepath.merge(model, "a")
        figures[f"merged swap, kept memory / copy, {short}"] = interleaved(
            {"ours": swap(True), "base": copy}, rounds=rounds
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--many", type=int, default=100)
    parser.add_argument(
        "--only", nargs="+", default=["inject", "load", "activate", "merge"], metavar="WHAT"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    measures: dict[str, Callable[[], dict[str, Seconds]]] = {
        "inject": lambda: injecting(arguments.rounds),
        "load": lambda: loading(arguments.rounds, arguments.many),
        "activate": lambda: activating(arguments.rounds, arguments.many),
        "merge": lambda: merging(arguments.rounds),
    }
    measured: dict[str, Seconds] = {}
    for what in arguments.only:
        measured |= measures[what]()
    figures, rows = [], []
    for name, seconds in measured.items():
        medians = {who: statistics.median(times) for who, times in seconds.items()}
        figure: dict[str, Any] = {"name": name, **medians}
        for who in ("peer", "base"):
            if who in seconds:
                over = ("peer", "ours") if who == "peer" else ("ours", "base")
                figure["ratio"] = ratios(seconds[over[0]], seconds[over[1]])
                figure["ratio_of"] = " / ".join(over)
        figures.append(figure)
        rows.append(_row(name, figure))
    head = ("figure", "ratio", "of", "ours ms", "PEFT ms", "base ms")
    show({"machine": machine(), "figures": figures}, markdown(head, rows))


def _row(name: str, figure: dict[str, Any]) -> tuple[object, ...]:
    ratio = figure.get("ratio")
    told = "-" if ratio is None else "{median:.2f} ({min:.2f} to {max:.2f})".format(**ratio)
    times = (f"{1000 * figure[w]:.3g}" if w in figure else "-" for w in ("ours", "peer", "base"))
    return (name, told, figure.get("ratio_of", "-"), *times)


if __name__ == "__main__":
    main()
