"""A tokenizer of single bytes and rows for it: nothing of the network or of ../shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.training.tokens import byte_tokenizer, pairs_of_many_lengths


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
    return AutoModelForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)
