from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from sidepath.config import TrainConfig
from sidepath.data.dataset import Data, load_data
from sidepath.errors import TrainError
from sidepath.training.batching import collate_packed
from sidepath.training.loop import train
from sidepath.training.loss import batch_loss
from sidepath.training.packing import require_packable
from tests.training.kit import batch_of, bert, llama, with_lora

SMALL: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def made(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=258, n_embd=16, n_layer=2, n_head=2, n_positions=128, attn_pdrop=0.0
        )
        return GPT2LMHeadModel(config).eval()
    if kind == "mistral, sliding window":
        return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=5)).eval()
    if kind == "gemma3, both kinds of layer":
        config = Gemma3TextConfig(
            **SMALL,
            head_dim=8,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention"],
        )
        return Gemma3ForCausalLM(config).eval()
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SMALL)).eval()
    return llama()


KINDS = ["llama", "gpt2", "mistral, sliding window", "gemma3, both kinds of layer", "qwen2"]


@pytest.fixture
def data(tokenizer: Any, pairs: Any) -> Data:
    return load_data(pairs, tokenizer, max_tokens=64)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_the_unpacked_rows(kind: str, attention: str, data: Data) -> None:
    """Against each row by itself, every parameter's gradient; the model in float64, in which
    some kinds still run softmax or norms in float32.
    """
    model = made(kind).double()
    model.set_attn_implementation(attention)
    expected = sum(batch_loss(model, batch_of(data, [row])) for row in range(8))
    assert isinstance(expected, torch.Tensor)
    expected.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    examples = data.examples
    bins = [[examples[at] for at in bin_] for bin_ in ((3, 0, 5), (1, 2, 4, 6), (7,))]
    packed = batch_loss(model, collate_packed(bins, range(8), data.pad_id))
    packed.backward()
    torch.testing.assert_close(packed, expected, rtol=1e-8, atol=0)
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_models_that_keep_examples_apart_are_accepted(
    kind: str, dtype: torch.dtype, data: Data
) -> None:
    model = made(kind).to(dtype).train()
    require_packable(model, data)
    assert model.training


class Mixing(nn.Module):
    """A model whose layers are told nothing of the positions: everything sees everything."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama()

    def forward(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None) -> Any:
        return self.inner(input_ids=input_ids)


def test_a_model_that_mixes_examples_is_refused(data: Data) -> None:
    with pytest.raises(TrainError, match="mixes the examples"):
        require_packable(Mixing(), data)


def test_a_model_without_positions_is_refused(data: Data) -> None:
    config = BloomConfig(vocab_size=258, hidden_size=16, n_layer=1, n_head=2)
    with pytest.raises(TrainError, match="position_ids"):
        require_packable(BloomForCausalLM(config), data)


def test_labelled_rows_are_refused(tokenizer: Any) -> None:
    rows = [{"text": "ab", "label": at % 2} for at in range(4)]
    with pytest.raises(TrainError, match="causal rows"):
        next(train(bert(), load_data(rows, tokenizer), TrainConfig(steps=1, packing=True)))


def test_rows_of_unknown_length_are_refused(tokenizer: Any, pairs: Any) -> None:
    data = load_data(pairs, tokenizer, transform=lambda fields: fields)
    with pytest.raises(TrainError) as caught:
        train(with_lora(llama()), data, TrainConfig(steps=1, packing=True))
    assert "a transform may change them" in caught.value.faults[0]


def test_a_packed_run_sees_every_row_and_learns(data: Data) -> None:
    model = llama()
    config = TrainConfig(epochs=6, batch_size=2, packing=True, learning_rate=1e-2)
    reports = list(train(model, data, config))
    tokens = sum(data.lengths)
    assert sum(report.tokens for report in reports) == 6 * tokens
    assert reports[-1].epoch == 6
    assert len(reports) < 6 * 12, "fewer steps than unpacked rows in twos"
    assert reports[-1].loss < 0.8 * reports[0].loss


def test_one_step_of_everything_has_the_unpacked_loss(data: Data) -> None:
    losses = []
    for packing, size in ((False, 24), (True, 24)):
        config = TrainConfig(steps=1, batch_size=size, packing=packing)
        losses.append(next(train(with_lora(llama()), data, config)).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
