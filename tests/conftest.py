"""What every test shares: small models of each kind, and the material beside the checkout."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch is imported: two test processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import Tensor, nn

from tests.tokens import byte_tokenizer, pairs_of_many_lengths

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared material beside the checkout; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip("the shared material is not beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def stories(shared: Path) -> Path:
    """The folder of a real pre-trained Llama of 260,032 parameters."""
    return shared / "models" / "stories260K"


@pytest.fixture
def tokenizer() -> Any:
    """One token a byte, a begin token before every text, and no padding token."""
    return byte_tokenizer()


@pytest.fixture
def pairs() -> list[dict[str, str]]:
    """Prompts and completions of many lengths."""
    return pairs_of_many_lengths()


@pytest.fixture(scope="session")
def real(stories: Path) -> tuple[Any, Any]:
    """The pre-trained 260K-parameter Llama (do not train it: copy it) and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)


def tiny_llama(vocab: int = 64, layers: int = 2, tied: bool = False) -> Any:
    """A random Llama with grouped-query attention: 32 wide, deterministic."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2() -> Any:
    """A random GPT-2 (transformers' Conv1D, fused c_attn, tied embeddings): 32 wide."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(7)
    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=2,
        vocab_size=64,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config).eval()


def tiny_bert(labels: int = 2) -> Any:
    """A random BERT with a classification head: 32 wide."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(7)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=64,
        max_position_embeddings=64,
        num_labels=labels,
    )
    return BertForSequenceClassification(config).eval()


class Vision(nn.Module):
    """A small network of convolutions, for the kinds no language model has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 5) of images (B, 3, H, W)."""
        hidden = self.norm(self.grouped(torch.relu(self.stem(x))))
        result: Tensor = self.head(hidden.mean(dim=(2, 3)))
        return result


def randomise(parameters: Iterator[nn.Parameter], std: float = 0.1) -> None:
    """Give fresh deltas values, as training would."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter, dtype=torch.float32) * std)


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], Tensor]]] = {
    "llama": (tiny_llama, lambda: torch.randint(3, 64, (3, 7))),
    "gpt2": (tiny_gpt2, lambda: torch.randint(3, 64, (3, 7))),
    "bert": (tiny_bert, lambda: torch.randint(3, 64, (3, 7))),
    "vision": (lambda: Vision().eval(), lambda: torch.randn(3, 3, 6, 6)),
}


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """A model's logits, without gradients."""
    with torch.no_grad():
        result = model(inputs)
    return result if isinstance(result, Tensor) else result.logits
