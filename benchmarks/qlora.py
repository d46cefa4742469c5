"""A training step over an NF4 base against one over the same base in bfloat16: ours and PEFT's.

A random Llama of 110M parameters (768 wide, 12 blocks), LoRA r=8 on all linear layers in
bfloat16, a batch of 4 x 128 tokens; forward and backward, interleaved in one process. Also the
bytes of the blocks' linear layers before and after.

    python benchmarks/qlora.py [--rounds 9] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sidepath
from common import interleaved, machine, markdown, ratios, show
from sidepath import LoRA
from sidepath.core.quant import is_packed, state_of
from sidepath.injection.places import preset_paths
from sidepath.injection.quantising import quantise_


def llama(layers: int, *, packed: bool) -> Any:
    """A random Llama in bfloat16, or with the linear layers of its blocks in NF4."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
        vocab_size=16384,
    )
    model = LlamaForCausalLM(config).bfloat16()
    if packed:
        quantise_(model)
        model.is_loaded_in_4bit = True  # what PEFT asks a model for
    return model


def linear_bytes(model: Any) -> int:
    """Bytes of the blocks' linear weights; packed ones with their scales and tables."""
    total = 0
    for path in preset_paths(model, "all-linear"):
        weight = model.get_submodule(path).weight
        total += weight.nbytes
        state = state_of(weight)
        if state is not None:
            parts = (state.absmax, state.code, state.state2.absmax, state.state2.code)
            total += sum(part.nbytes for part in parts) + state.offset.nbytes
    return total


def with_peft(model: Any) -> Any:
    """PEFT's adapter of the same shape and dtype."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    made = get_peft_model(model, config, autocast_adapter_dtype=False)
    return made.bfloat16() if not any(map(is_packed, model.modules())) else _adapters_in(made)


def _adapters_in(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    return model


def with_sidepath(model: Any) -> Any:
    sidepath.inject(model, LoRA(r=8, alpha=16, dtype="bfloat16"), name="bench")
    return model


def step(model: Any, ids_BT: torch.Tensor, processor: list[float]) -> Callable[[], None]:
    """Forward and backward of one batch; gradients of what is trained, no optimiser.

    Collects the processor's seconds as well: on a shared machine they wander less.
    """
    model.train()

    def run() -> None:
        began = time.process_time()
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        model.zero_grad(set_to_none=True)
        processor.append(time.process_time() - began)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    models = {
        "ours": with_sidepath(llama(arguments.layers, packed=False)),
        "ours NF4": with_sidepath(llama(arguments.layers, packed=True)),
        "PEFT": with_peft(llama(arguments.layers, packed=False)),
        "PEFT NF4": with_peft(llama(arguments.layers, packed=True)),
    }
    sizes = [linear_bytes(llama(arguments.layers, packed=packed)) for packed in (False, True)]
    ids_BT = torch.randint(0, 16384, (4, 128))
    processor: dict[str, list[float]] = {name: [] for name in models}
    seconds = interleaved(
        {name: step(model, ids_BT, processor[name]) for name, model in models.items()},
        rounds=arguments.rounds,
    )
    pairs = {
        "ours: NF4 / bfloat16": ("ours NF4", "ours"),
        "PEFT: NF4 / bfloat16": ("PEFT NF4", "PEFT"),
        "PEFT NF4 / ours NF4": ("PEFT NF4", "ours NF4"),
    }
    found = {name: ratios(seconds[one], seconds[other]) for name, (one, other) in pairs.items()}
    for name, (one, other) in pairs.items():
        last = slice(-arguments.rounds, None)
        spent = ratios(processor[one][last], processor[other][last])
        found[f"{name}, processor seconds"] = spent
    table = markdown(
        ("figure", "median", "lowest", "highest"),
        [
            (name, f"{r['median']:.3f}", f"{r['min']:.3f}", f"{r['max']:.3f}")
            for name, r in found.items()
        ],
    )
    medians = {name: 1000 * statistics.median(times) for name, times in seconds.items()}
    times = markdown(("step", "ms"), [(name, f"{value:.0f}") for name, value in medians.items()])
    before, after = (size / 2**20 for size in sizes)
    text = f"linear layers: {before:.1f} MiB in bfloat16, {after:.1f} MiB in NF4"
    show(
        {
            "machine": machine(),
            "figures": [{"name": name, "ratio": ratio} for name, ratio in found.items()],
            "milliseconds": medians,
            "linear_bytes": {"bfloat16": sizes[0], "nf4": sizes[1]},
        },
        table,
        times,
        text,
    )


if __name__ == "__main__":
    main()
