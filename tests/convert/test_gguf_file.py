"""GGUF adapters: read back by the gguf package, and run by llama.cpp where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from torch import nn

from sidepath.convert.formats import convert
from sidepath.convert.gguf_names import rows_in_halves, rows_in_pairs
from sidepath.convert.portable import Base
from sidepath.errors import ConfigError, StoreError
from tests.conftest import tiny_gpt2, tiny_llama

from .conftest import biased_llama
from .llama_base import pairs_of_halves, write_base
from .made import ATTENTION, made, options, save_base

PYTHON = os.environ.get("SIDEPATH_LLAMA_PYTHON") or (
    sys.executable if importlib.util.find_spec("llama_cpp") else None
)
"""An interpreter that has llama-cpp-python; it need not be this one."""

RUN = """
import json, sys
import numpy as np
from llama_cpp import Llama
base, adapter, ids, more = sys.argv[1:]
ids, more = json.loads(ids), int(more)
llm = Llama(base, lora_path=adapter or None, n_ctx=256, logits_all=True, verbose=False, n_threads=1,
            type_k=0, type_v=0)
llm.eval(ids)
logits = np.array(llm.scores[: len(ids)])
tokens = [int(logits[-1].argmax())]
while len(tokens) < more:
    llm.eval(tokens[-1:])
    tokens.append(int(np.array(llm.scores[llm.n_tokens - 1]).argmax()))
print(json.dumps({"logits": logits.tolist(), "tokens": tokens}))
"""


def by_llama_cpp(base: Path, adapter: Path | str, ids: list[int]) -> tuple[torch.Tensor, list[int]]:
    assert PYTHON is not None
    command = [PYTHON, "-c", RUN, str(base), str(adapter), json.dumps(ids), "24"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(done.stdout)
    return torch.tensor(found["logits"]), found["tokens"]


def by_transformers(model: nn.Module, ids: list[int]) -> tuple[torch.Tensor, list[int]]:
    model.eval()
    tokens = list(ids)
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
        while len(tokens) < len(ids) + 24:
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return logits, tokens[len(ids) :]


@pytest.mark.skipif(
    PYTHON is None,
    reason="llama-cpp-python is not installed (it compiles llama.cpp); "
    "SIDEPATH_LLAMA_PYTHON names an interpreter that has it",
)
@pytest.mark.parametrize(
    "settings",
    [
        {"targets": ("all-linear", "embed_tokens", "lm_head"), "rank_pattern": {"q_proj": 2}},
        {"targets": ATTENTION, "alpha_pattern": {"k_proj": 32}, "scaling": "alpha/sqrt(r)"},
    ],
)
def test_llama_cpp_gives_the_same_tokens(settings: dict, llama: Base, tmp_path: Path) -> None:  # type: ignore[type-arg]
    base = write_base(llama.model, tmp_path / "base.gguf")
    folder, model = made(biased_llama, tmp_path / "ours", r=4, alpha=8, **settings)
    convert(folder, tmp_path / "adapter.gguf", "gguf", options=options(llama))
    ids = [1, 5, 9, 33, 7, 2, 60, 11]
    plain = by_transformers(biased_llama(), ids)
    expected = by_transformers(model, ids)
    assert (plain[0] - expected[0]).abs().max() > 0.5, "the adapter does something"
    found = by_llama_cpp(base, "", ids)
    assert torch.allclose(found[0], plain[0], atol=1e-4)
    found = by_llama_cpp(base, tmp_path / "adapter.gguf", ids)
    assert (found[0] - expected[0]).abs().max() < 1e-3 * (plain[0] - expected[0]).abs().max()
    assert found[1] == expected[1]


def test_what_the_gguf_package_reads(llama: Base, tmp_path: Path) -> None:
    folder, model = made(
        biased_llama, tmp_path / "ours", r=4, alpha=8, targets=("q_proj", "o_proj", "embed_tokens")
    )
    convert(folder, tmp_path / "adapter.gguf", "gguf", options=options(llama))
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    said = {
        key: reader.get_field(key).contents()
        for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha")
    }
    assert said == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
    }
    found = {one.name: torch.tensor(one.data) for one in reader.tensors}
    assert len(found) == 2 * 5
    deltas = model.get_submodule("model.layers.1.self_attn")
    for part, name, heads in (("q_proj", "attn_q", 4), ("o_proj", "attn_output", None)):
        own = dict(deltas.get_submodule(part).named_parameters())
        A = next(value for key, value in own.items() if key.endswith(".A")).detach()
        B = next(value for key, value in own.items() if key.endswith(".B")).detach()
        assert torch.equal(found[f"blk.1.{name}.weight.lora_a"], A)
        expected = B if heads is None else pairs_of_halves(B, heads)
        assert torch.equal(found[f"blk.1.{name}.weight.lora_b"], expected)
    assert found["token_embd.weight.lora_a"].shape == (64, 4)
    assert found["token_embd.weight.lora_b"].shape == (32, 4)


@pytest.mark.parametrize(("rows", "heads"), [(8, 1), (8, 2), (24, 3), (4, 2)])
def test_rows_against_the_slow_reference(rows: int, heads: int) -> None:
    B = torch.randn(rows, 3)
    assert torch.equal(rows_in_pairs(B, heads), pairs_of_halves(B, heads))
    assert torch.equal(rows_in_halves(rows_in_pairs(B, heads), heads), B)


def test_a_file_that_is_not_ours_needs_the_base(llama: Base, tmp_path: Path) -> None:
    """As llama.cpp's own converter writes it: no record of ours, no heads."""
    folder, _ = made(biased_llama, tmp_path / "ours", r=4, alpha=8, targets=ATTENTION)
    convert(folder, tmp_path / "ours.gguf", "gguf", options=options(llama))
    reader = gguf.GGUFReader(tmp_path / "ours.gguf")
    writer = gguf.GGUFWriter(tmp_path / "plain.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for one in reader.tensors:
        writer.add_tensor(one.name, one.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match="names of the base's modules"):
        convert(tmp_path / "plain.gguf", tmp_path / "back", "sidepath")
    convert(tmp_path / "plain.gguf", tmp_path / "back", "sidepath", options=options(llama))
    weights = "adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (tmp_path / "back" / weights).read_bytes()


def test_what_cannot_be_said(tmp_path: Path) -> None:
    """A tied head, a family without names, no base at all: refused, and nothing is written."""
    tied = save_base(tiny_llama(tied=True), tmp_path / "base")
    folder, _ = made(
        lambda: tiny_llama(tied=True), tmp_path / "ours", r=2, targets=("embed_tokens", "q_proj")
    )
    target = tmp_path / "adapter.gguf"
    with pytest.raises(StoreError, match="twice"):
        convert(folder, target, "gguf", options=options(tied))
    with pytest.raises(ConfigError, match="follow from its base"):
        convert(folder, target, "gguf")
    other = save_base(tiny_gpt2(), tmp_path / "gpt2")
    folder, _ = made(tiny_gpt2, tmp_path / "theirs", r=2, targets=("c_attn",))
    with pytest.raises(StoreError, match="type gpt2"):
        convert(folder, target, "gguf", options=options(other))
    assert not target.exists()
