"""Batches of rows routed to many adapters, over the same base alone; PEFT beside, if installed.

    python benchmarks/routed.py [--only decode-64x64] [--dtype float32 bfloat16] [--rounds 15]

A random Llama (768 wide, 12 layers, 12 heads and 4 of keys, 2,048 inside, 32,000 words) with LoRA
r=8 on all linear layers, adapters in float32. Decode is one token a row after 32 cached ones.
Ours runs within one `route` block; `first` is the block's first pass, which stacks the factors.

The bounds beside it count what has to be read where memory is the limit: `1 + 2 K r / d` for K
adapters beside one square layer of width d, and the bytes of all factors over the base's weights.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import interleaved, machine, markdown, ratios, show

RANK, WIDTH, CACHED = 8, 768, 32


@dataclass(frozen=True)
class Figure:
    """One row of the table: a batch, its adapters, and the ratio to reach, by dtype."""

    rows: int
    tokens: int
    adapters: int
    decode: bool
    target: dict[str, float]

    def names(self) -> list[str]:
        """Row by row, the adapters' names: neighbours share one where rows outnumber them."""
        return [f"a{row * self.adapters // self.rows}" for row in range(self.rows)]


FIGURES = {
    "forward-8x32-4": Figure(8, 32, 4, False, {"float32": 1.06, "bfloat16": 1.06}),
    "decode-8-4": Figure(8, 1, 4, True, {"float32": 1.12, "bfloat16": 1.12}),
    "decode-64-64": Figure(64, 1, 64, True, {"float32": 1.45, "bfloat16": 1.50}),
    "forward-64x16-64": Figure(64, 16, 64, False, {"float32": 1.10, "bfloat16": 1.15}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES))
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=25.0, help="no more than this a figure")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-peer", action="store_true", help="leave PEFT out")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    found = [measured(name, dtype, options) for dtype in options.dtype for name in options.only]
    head = ["figure", "dtype", "ours / base", "min", "max", "to reach", "PEFT / base", "bound",
            "bytes", "first / base"]  # fmt: skip
    show({"machine": machine(), "figures": found}, machine(), markdown(head, map(cells, found)))


def cells(figure: dict[str, Any]) -> list[str]:
    """One row of the table."""
    ratio, peer = figure["ratio"], figure["peer_over_base"]
    return [
        figure["name"],
        figure["dtype"],
        f"{ratio['median']:.3f}",
        f"{ratio['min']:.3f}",
        f"{ratio['max']:.3f}",
        f"{figure['target']:.2f}",
        "" if peer is None else f"{peer['median']:.2f}",
        f"{figure['bound']:.2f}",
        f"{figure['bytes']:.2f}",
        f"{figure['first_over_base']:.2f}",
    ]


def llama(dtype: str, layers: int) -> nn.Module:
    """The same random model each time it is called."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=32_000,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config).eval().to(getattr(torch, dtype))


def ours(dtype: str, figure: Figure, layers: int) -> nn.Module:
    """The model with the figure's adapters, their factors random."""
    import sidepath

    model = llama(dtype, layers)
    for number in range(figure.adapters):
        sidepath.inject(model, sidepath.LoRA(r=RANK), name=f"a{number}")
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.02)
    return model


def peer(dtype: str, figure: Figure, layers: int) -> nn.Module | None:
    """The same in PEFT, or None where it is not installed."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return None
    config = LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(llama(dtype, layers), config, adapter_name="a0")
    for number in range(1, figure.adapters):
        model.add_adapter(f"a{number}", config)
    result: nn.Module = model.eval()
    return result


def step_of(model: nn.Module, figure: Figure, **more: Any) -> Callable[[], object]:
    """One forward pass of the figure's batch; a decoding one after the same cached tokens."""
    torch.manual_seed(1)
    ids = torch.randint(3, 32_000, (figure.rows, figure.tokens))
    if not figure.decode:
        return lambda: model(ids, use_cache=False, **more)
    prompt = torch.randint(3, 32_000, (figure.rows, CACHED))
    cache = model(prompt, use_cache=True, **more).past_key_values

    def decode() -> object:
        result = model(ids, past_key_values=cache, use_cache=True, **more)
        cache.crop(-figure.tokens)
        return result

    return decode


@contextlib.contextmanager
def _steps(
    figure: Figure, dtype: str, options: argparse.Namespace
) -> Iterator[tuple[dict[str, Callable[[], object]], float]]:
    import sidepath

    base = step_of(llama(dtype, options.layers), figure)
    model = ours(dtype, figure, options.layers)
    steps = {"base": base}
    with sidepath.route(model, figure.names()):
        steps["ours"] = step_of(model, figure)
    peft = None if options.no_peer else peer(dtype, figure, options.layers)
    if peft is not None:
        steps["peer"] = step_of(peft, figure, adapter_names=figure.names())
    with sidepath.route(model, figure.names()):
        began = time.perf_counter()
        steps["ours"]()
        yield steps, time.perf_counter() - began


def measured(name: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """One figure: all ways interleaved, in one process."""
    figure = FIGURES[name]
    with torch.no_grad(), _steps(figure, dtype, options) as (steps, first):
        once = sum(interleaved(steps, rounds=1, warmup=1)[way][0] for way in steps)
        rounds = max(3, min(options.rounds, int(options.seconds / once)))
        seconds = interleaved(steps, rounds=rounds, warmup=1)
    base = statistics.median(seconds["base"])
    factors, weights = _sizes(options.layers)
    of = {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]
    print(f"{name} {dtype}: {ratios(seconds['ours'], seconds['base'])}", file=sys.stderr)
    return {
        "name": name,
        "dtype": dtype,
        "rounds": rounds,
        "ours": statistics.median(seconds["ours"]),
        "base": base,
        "peer": statistics.median(seconds["peer"]) if "peer" in seconds else None,
        "ratio": ratios(seconds["ours"], seconds["base"]),
        "peer_over_base": ratios(seconds["peer"], seconds["base"]) if "peer" in seconds else None,
        "target": figure.target[dtype],
        "bound": 1 + 2 * figure.adapters * RANK / WIDTH,
        "bytes": 1 + figure.adapters * factors * of / (weights * of),
        "first_over_base": first / base,
    }


def _sizes(layers: int) -> tuple[int, int]:
    """Numbers in one adapter's factors, and in the base's matrices with its head."""
    shapes = [(768, 768), (768, 256), (768, 256), (768, 768), *[(768, 2048)] * 3]
    factors = layers * sum(RANK * (rows + columns) for rows, columns in shapes)
    return factors, layers * sum(rows * columns for rows, columns in shapes) + 32_000 * WIDTH


if __name__ == "__main__":
    main()
