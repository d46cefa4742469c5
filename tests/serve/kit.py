"""Bases, adapters and references that the tests of the engine share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sidepath
from sidepath import LoRA
from sidepath.cli.serve_run import HOST
from sidepath.serve.engine import Engine
from sidepath.serve.http import application
from tests.conftest import randomise, tiny_bert, tiny_llama
from tests.serve import sockets

GROUPED = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_gemma3() -> Any:
    """A random Gemma 3: grouped queries, and layers with a window of 8 and without in turn."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(11)
    kinds = ["sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(num_hidden_layers=4, layer_types=kinds, **GROUPED)
    return Gemma3ForCausalLM(config).eval()


def tiny_gemma2() -> Any:
    """A random Gemma 2: the same, with caps on scores, so that its attention is the eager one."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(13)
    return Gemma2ForCausalLM(Gemma2Config(num_hidden_layers=2, **GROUPED)).eval()


def tiny_mistral() -> Any:
    """A random Mistral: every layer has the same window of 8."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(12)
    return MistralForCausalLM(MistralConfig(num_hidden_layers=2, **GROUPED)).eval()


def embedded() -> nn.Module:
    """The base in the package."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(sidepath.embedded_base())
    return model.eval()


class Letters:
    """A tokenizer: a token a letter."""

    pad_token_id = 0

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 60 for letter in text]}


def tiny_encoder() -> nn.Module:
    """A random BERT without a head."""
    from transformers import BertModel

    torch.manual_seed(7)
    model: nn.Module = BertModel(tiny_bert().config).eval()
    return model


BASES = {
    "llama": tiny_llama,
    "gemma3": tiny_gemma3,
    "gemma2": tiny_gemma2,
    "mistral": tiny_mistral,
    "embedded": embedded,
}


def save_adapters(make: Any, folder: Path, count: int) -> list[Path]:
    """Adapters of different ranks and targets, each far enough from the base to be told apart."""
    model = make()
    folders = []
    for number in range(count):
        targets = [("q_proj", "v_proj"), ("all-linear",), ("down_proj", "k_proj")][number % 3]
        adapter = sidepath.inject(model, LoRA(r=2 + number, alpha=8, targets=targets), name="new")
        torch.manual_seed(100 + number)
        randomise(adapter.parameters(), std=0.3)
        folders.append(adapter.save(folder / f"adapter-{number}"))
        sidepath.remove(model, "new")
    return folders


@contextmanager
def served(engine: Engine) -> Iterator[str]:
    """The engine behind a real socket of this machine, its base called "base"; the address."""
    with sockets.served(application(engine, "base")) as port:
        yield f"http://{HOST}:{port}"


class Alone:
    """What `generate` gives with one adapter alone: the reference."""

    def __init__(self, make: Any, folders: list[Path]) -> None:
        self.model: Any = make()
        for number, folder in enumerate(folders):
            sidepath.load(self.model, folder, name=f"adapter-{number}")
        self._found: dict[tuple[Any, ...], tuple[int, ...]] = {}

    def tokens(self, adapter: int | None, prompt: tuple[int, ...], new: int) -> tuple[int, ...]:
        """Greedy tokens, the end token included."""
        key = (adapter, prompt, new)
        if key not in self._found:
            sidepath.activate(self.model, None if adapter is None else f"adapter-{adapter}")
            ids = torch.tensor([prompt])
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
            self._found[key] = tuple(out[0, len(prompt) :].tolist())
        return self._found[key]
