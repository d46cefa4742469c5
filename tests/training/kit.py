"""Tiny models and small readers of examples, for the tests of training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from sidepath.data.dataset import Data
from sidepath.injection.surgery import activate, put_in
from sidepath.injection.targets import resolve
from sidepath.methods.lora import LoRA
from sidepath.training.batching import Batch, collate


def supervised_text(data: Data, row: int = 0) -> str:
    """What is supervised of a row, as text."""
    example = data.examples[row]
    return str(data.tokenizer.decode(example.ids_T[example.supervised_T].tolist()))


def whole_text(data: Data, row: int = 0) -> str:
    """A row as text, special tokens included."""
    return str(data.tokenizer.decode(data.examples[row].ids_T.tolist()))


def batch_of(data: Data, rows: Iterable[int]) -> Batch:
    """The padded batch of these rows."""
    chosen = list(rows)
    return collate([data.examples[row] for row in chosen], chosen, data.pad_id)


def llama(*, seed: int = 0, context: int = 128) -> Any:
    """A random Llama for the byte tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=context,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def bert(*, labels: int = 2, seed: int = 0) -> Any:
    """A random BERT with a classification head and dropout, for the byte tokenizer."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        num_labels=labels,
    )
    return BertForSequenceClassification(config).eval()


def with_lora(model: Any, name: str = "a", **fields: Any) -> Any:
    """The model with an active LoRA adapter."""
    config = LoRA(**{"r": 2, "alpha": 4, "targets": ("q_proj", "v_proj"), **fields})
    torch.manual_seed(5)
    put_in(model, config, name, resolve(model, config))
    activate(model, name)
    return model
