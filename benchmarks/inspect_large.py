"""`sidepath inspect` of an adapter as large as one of a 7B model: seconds and peak memory.

32 blocks, 4,096 wide, 11,008 inside, all seven linear layers, rank 64: 160 million numbers, drawn
at random. The adapter is written to a temporary folder; the command runs in a process of its own.

    python benchmarks/inspect_large.py [--dtype float32] [--blocks 32]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from common import machine, show

WIDTH, INNER, RANK = 4096, 11008, 64
MATRICES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, WIDTH),
    "self_attn.v_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
SETTINGS = {
    "peft_type": "LORA",
    "r": RANK,
    "lora_alpha": 2 * RANK,
    "target_modules": [name.partition(".")[2] for name in MATRICES],
}


def write(folder: Path, blocks: int, dtype: torch.dtype) -> int:
    """An adapter with Gaussian factors in PEFT's form; its bytes."""
    torch.manual_seed(0)
    tensors = {}
    for block in range(blocks):
        for name, (rows, columns) in MATRICES.items():
            start = f"base_model.model.model.layers.{block}.{name}"
            tensors[f"{start}.lora_A.weight"] = torch.randn(RANK, columns).to(dtype)
            tensors[f"{start}.lora_B.weight"] = torch.randn(rows, RANK).to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS))
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--blocks", type=int, default=32)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = write(Path(folder), arguments.blocks, getattr(torch, arguments.dtype))
        words = [sys.executable, "-m", "sidepath", "inspect", folder, "--json"]
        began = time.perf_counter()
        process = subprocess.Popen(words, stdout=subprocess.PIPE)
        assert process.stdout is not None
        document = json.loads(process.stdout.read())
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
    assert status == 0, status
    found = {
        "layers": len(document["layers"]),
        "adapter_bytes": size,
        "seconds": seconds,
        "peak_bytes": used.ru_maxrss * 1024,
        "machine": machine(),
    }
    said = (
        f"{found['layers']} layers in {seconds:.1f} s, peak {found['peak_bytes'] / 2**30:.2f} GiB"
    )
    show(found, said)


if __name__ == "__main__":
    main()
