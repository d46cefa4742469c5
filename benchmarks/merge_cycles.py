"""1,000 merges, unmerges and swaps in memory: how many bits of the base are another afterwards.

A random Llama (256 wide, 4 blocks) with two adapters on all its linear layers (r=8). A cycle merges
the one, unmerges it keeping its memory, merges the other, and unmerges. PEFT's figure is the share
of the adapted weights' elements that one merge and unmerge changed.

    python benchmarks/merge_cycles.py [--cycles 1000]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn

import sidepath
from common import machine, markdown, show
from sidepath.bench.peers import has_peft, with_ours, with_peft

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def model_in(dtype: torch.dtype) -> nn.Module:
    """The base, the same each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
        vocab_size=1000,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(dtype)


def copies(model: nn.Module) -> dict[str, Tensor]:
    """The base's parameters by name, copied."""
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): held.detach().clone()
        for name, held in model.named_parameters()
        if "lora" not in name and "sidepath" not in name
    }


def changed(before: dict[str, Tensor], after: dict[str, Tensor], adapted: set[str]) -> float:
    """The share of the adapted weights' elements with other bits."""
    differ = sum(int((_bits(before[name]) != _bits(after[name])).sum()) for name in adapted)
    return differ / sum(before[name].numel() for name in adapted)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.itemsize == 4 else torch.int16)


def ours(dtype: torch.dtype, cycles: int) -> tuple[float, bool]:
    """The share of changed elements after all cycles; whether the memory is the base's own."""
    model = model_in(dtype)
    before = copies(model)
    places = {name: held.data_ptr() for name, held in model.named_parameters()}
    with_ours(model, ("one", "two"))
    adapted = {f"{path}.weight" for path in sidepath.Adapter("one", model).deltas}
    for _ in range(cycles):
        sidepath.merge(model, "one")
        sidepath.unmerge(model, keep=True)
        sidepath.merge(model, "two")
        sidepath.unmerge(model)
    now = {name: held.data_ptr() for name, held in model.named_parameters() if name in places}
    return changed(before, copies(model), adapted), now == places


def peers(dtype: torch.dtype, cycles: int) -> float:
    """PEFT's share after so many merges and unmerges of one adapter."""
    model: Any = model_in(dtype)
    before = copies(model)
    model = with_peft(model, ("one",))
    adapted = {
        name.replace("base_model.model.", "").replace(".base_layer", "")
        for name, _ in model.named_parameters()
        if "base_layer.weight" in name
    }
    for _ in range(cycles):
        model.merge_adapter()
        model.unmerge_adapter()
    return changed(before, copies(model), adapted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=1000)
    cycles = parser.parse_args().cycles
    rows = []
    for dtype in DTYPES:
        share, same = ours(dtype, cycles)
        row = {"dtype": str(dtype).removeprefix("torch."), "ours": share, "same_memory": same}
        if has_peft():
            row |= {"peft_one_cycle": peers(dtype, 1), "peft_ten_cycles": peers(dtype, 10)}
        rows.append(row)
    head = list(rows[0])
    show(
        {"cycles": cycles, "rows": rows, "machine": machine()},
        f"{cycles} cycles: share of the adapted weights' elements with other bits",
        markdown(head, [list(row.values()) for row in rows]),
    )


if __name__ == "__main__":
    main()
