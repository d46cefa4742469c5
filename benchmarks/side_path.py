"""The side path against PEFT's and against the base alone, interleaved in one process.

A random Llama (about 30M parameters by default), LoRA r=8 on all linear layers, float32, two
threads: injecting, one un-merged forward pass, one training step. Ratios first; the absolute
times belong to the machine named beside them.

    python benchmarks/side_path.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sidepath
from common import interleaved, machine, markdown, ratios, show
from sidepath import LoRA


def llama(layers: int) -> torch.nn.Module:
    """A random Llama, 512 wide."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=4096,
    )
    return LlamaForCausalLM(config)


def with_peft(model: torch.nn.Module) -> Any:
    """PEFT's adapter of the same shape."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)  # type: ignore[arg-type]


def with_sidepath(model: torch.nn.Module) -> torch.nn.Module:
    sidepath.inject(model, LoRA(r=8, alpha=16, targets=("all-linear",)), name="bench")
    return model


def step(model: Any, ids_BT: torch.Tensor) -> Callable[[], None]:
    """Forward and backward of one batch; gradients of what is trained, no optimiser."""

    def run() -> None:
        model.train()
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def forward(model: Any, ids_BT: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        model.eval()
        with torch.no_grad():
            model(input_ids=ids_BT)

    return run


def injecting(layers: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of putting an adapter on fresh models; making the models is not counted."""
    fresh = {who: [llama(layers) for _ in range(rounds + 1)] for who in ("ours", "peer")}
    return interleaved(
        {
            "ours": lambda: with_sidepath(fresh["ours"].pop()),
            "peer": lambda: with_peft(fresh["peer"].pop()),
        },
        rounds=rounds,
        warmup=1,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    base = llama(arguments.layers)
    ours, peer = with_sidepath(llama(arguments.layers)), with_peft(llama(arguments.layers))
    ids_BT = torch.randint(0, 4096, (4, 128))
    measured = {
        "inject": injecting(arguments.layers, arguments.rounds),
        "forward 4x128": interleaved(
            {
                "ours": forward(ours, ids_BT),
                "peer": forward(peer, ids_BT),
                "base": forward(base, ids_BT),
            },
            rounds=arguments.rounds,
        ),
        "training step 4x128": interleaved(
            {"ours": step(ours, ids_BT), "peer": step(peer, ids_BT)}, rounds=arguments.rounds
        ),
    }
    figures, rows = [], []
    for name, seconds in measured.items():
        ratio = ratios(seconds["peer"], seconds["ours"])
        medians = {who: statistics.median(times) for who, times in seconds.items()}
        figures.append({"name": name, "ratio": ratio, **medians})
        rows.append(
            (
                name,
                f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
                *(
                    f"{1000 * medians[who]:.1f}" if who in medians else "-"
                    for who in ("ours", "peer", "base")
                ),
            )
        )
    table = markdown(("figure", "PEFT / ours", "ours ms", "PEFT ms", "base ms"), rows)
    show({"machine": machine(), "figures": figures}, table)


if __name__ == "__main__":
    main()
