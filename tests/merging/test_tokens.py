"""New tokens merged on disk: a plain model with longer tables, its config and its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sidepath.errors import MergeError
from sidepath.merging.merge import merge_folder
from sidepath.methods.lora import LoRA
from sidepath.store.adapter import inject, load
from sidepath.store.new_tokens import add_tokens
from tests.conftest import outputs, randomise, tiny_llama
from tests.merging.whole import tensors_in
from tests.methods.test_tokens import tiny_phi

SIZE = 258


@pytest.fixture(autouse=True)
def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def saved(model: Any, folder: Path, tokenizer: Any, dtype: torch.dtype, shard: str) -> Path:
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return folder


def loaded(folder: Path, **more: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **more).eval()


def adapter(base: Path, folder: Path, tokens: dict[str, int], config: LoRA) -> Path:
    made = inject(loaded(base), config, "x", new_tokens=tokens)
    randomise(made.parameters(), 0.2)
    return made.save(folder)


BASES: dict[str, Callable[[], Any]] = {
    "untied": lambda: tiny_llama(SIZE),
    "tied": lambda: tiny_llama(SIZE, tied=True),
    "padded": lambda: tiny_llama(SIZE + 6, tied=True),
}


@pytest.mark.parametrize(
    ("dtype", "shard"), [(torch.bfloat16, "20kB"), (torch.float32, "1GB")], ids=["bf16", "f32"]
)
@pytest.mark.parametrize("kind", BASES)
def test_a_merged_folder_has_the_rows(
    tmp_path: Path, tokenizer: Any, kind: str, dtype: torch.dtype, shard: str
) -> None:
    base = saved(BASES[kind](), tmp_path / "base", tokenizer, dtype, shard)
    tokens = add_tokens(tokenizer, ["<sql>", "<end>"])
    config = LoRA(r=2, targets=("q_proj",))
    folder = adapter(base, tmp_path / "a", tokens, config)
    found = merge_folder(base, [folder], tmp_path / "out")
    assert found.parity is not None
    assert found.parity.effect > 5 * found.parity.max_abs
    before, after = tensors_in(base), tensors_in(tmp_path / "out")
    stored = tensors_in(folder)
    size = len(before["model.embed_tokens.weight"])
    assert set(after) == set(before)
    for name, tensor in before.items():
        rows = stored.get(f"base_model.model.{name[:-7]}.token_adapter.trainable_tokens_delta")
        if rows is None:
            same = torch.equal(after[name], tensor)
            assert same != name.endswith("q_proj.weight")
            continue
        assert after[name].dtype == dtype
        assert len(after[name]) == max(size, SIZE + 2)
        assert torch.equal(after[name][SIZE : SIZE + 2], rows.to(dtype))
        assert torch.equal(after[name][:SIZE], tensor[:SIZE])
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["vocab_size"] == max(size, SIZE + 2)
    from transformers import AutoTokenizer

    merged, theirs = (
        loaded(tmp_path / "out", dtype=torch.float32),
        loaded(base, dtype=torch.float32),
    )
    own = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = torch.tensor([own("a<sql>b<end>")["input_ids"]])
    assert {*tokens.values()} < {*ids[0].tolist()}
    load(theirs, folder, "x")
    worst = (outputs(merged, ids) - outputs(theirs, ids)).abs().max()
    assert worst <= found.parity.tolerance


def test_a_bias_of_the_head_is_as_long(tmp_path: Path) -> None:
    tiny_phi().save_pretrained(tmp_path / "base")
    config = LoRA(r=2, targets=("q_proj",), token_rows=(5, 64, 65))
    folder = adapter(tmp_path / "base", tmp_path / "a", {}, config)
    merge_folder(tmp_path / "base", [folder], tmp_path / "out")
    bias = tensors_in(tmp_path / "out")["lm_head.bias"]
    assert torch.equal(bias[:64], tensors_in(tmp_path / "base")["lm_head.bias"])
    assert not bias[64:].any()
    assert len(bias) == 66


def test_beside_an_adapter_without_tokens_and_not_beside_one_with(
    tmp_path: Path, tokenizer: Any
) -> None:
    base = saved(BASES["tied"](), tmp_path / "base", tokenizer, torch.float32, "1GB")
    tokens = add_tokens(tokenizer, ["<sql>"])
    with_tokens = [
        adapter(base, tmp_path / name, tokens, LoRA(r=2, targets=("q_proj",))) for name in "ab"
    ]
    without = adapter(base, tmp_path / "c", {}, LoRA(r=2, targets=("v_proj",)))
    found = merge_folder(base, [with_tokens[0], without], tmp_path / "out")
    assert found.parity is not None
    assert len(tensors_in(tmp_path / "out")["model.embed_tokens.weight"]) == SIZE + 1
    with pytest.raises(MergeError, match="rows for tokens"):
        merge_folder(base, with_tokens, tmp_path / "two")
    assert not (tmp_path / "two").exists()
