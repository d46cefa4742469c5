"""A tokenizer of single bytes and rows for it: nothing of the network or of ../shared."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = {"<s>": 0, "</s>": 1}


def byte_tokenizer() -> Any:
    """One token a byte, a begin token before every text, and no padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {**SPECIAL, **{letter: at + 2 for at, letter in enumerate(alphabet)}}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", model_max_length=4096
    )


def pairs_of_many_lengths() -> list[dict[str, str]]:
    """Prompts and completions."""
    return [
        {"prompt": f"{'ab' * (at % 5)}{at}=", "completion": "xyz"[: at % 3 + 1] * (at % 4 + 1)}
        for at in range(24)
    ]
