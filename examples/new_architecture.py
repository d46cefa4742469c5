"""A new architecture in the table: MPT keeps queries, keys and values in one matrix, `Wqkv`.

    python examples/new_architecture.py

Which modules there are is read off the model; what a tree of modules cannot tell is where the parts
of a fused matrix lie. One line says so, and then `Wqkv:q,v` adapts its queries and values alone.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import MptConfig, MptForCausalLM

import sidepath
from sidepath import LoRA
from sidepath.errors import TargetNotFound
from sidepath.injection.architecture import FUSED

WIDTH = 32


def tiny_mpt() -> Any:
    """A random MPT of two blocks."""
    torch.manual_seed(0)
    settings = MptConfig(d_model=WIDTH, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=96)
    return MptForCausalLM(settings).eval()


def main() -> None:
    """Adapt queries and values of a model that was unknown a line before."""
    model = tiny_mpt()
    config = LoRA(r=2, targets=("Wqkv:q,v",))
    try:
        sidepath.plan(model, config, tokens=16)
    except TargetNotFound as error:
        print(f"before: {error.what}")

    FUSED["Wqkv"] = ("q", "k", "v")  # equal parts, one after the other

    print(sidepath.plan(model, config, tokens=16))
    adapter = sidepath.inject(model, config, name="mpt")
    ids = torch.randint(3, 96, (2, 12))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    weight = model.transformer.blocks[0].attn.Wqkv.weight
    before = weight.detach().clone()
    sidepath.merge(model, "mpt")
    changed = (model.transformer.blocks[0].attn.Wqkv.weight != before).any(dim=1).view(3, WIDTH)
    print(f"rows that changed, of queries, keys, values: {changed.sum(dim=1).tolist()}")


if __name__ == "__main__":
    main()
