from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sidepath.data.dataset import Data, load_data
from sidepath.errors import TrainError
from sidepath.training.loss import batch_loss
from tests.training.kit import batch_of, bert, llama


def slow_loss(model: Any, data: Data, smoothing: float) -> Tensor:
    """Row by row, token by token, without padding: the definition."""
    total = torch.zeros((), dtype=torch.float64)
    for example in data.examples:
        ids = torch.from_numpy(example.ids_T)[None]
        logits = model(input_ids=ids).logits.double()
        if example.label is not None:
            pairs = [(logits[0], example.label)]
        else:
            places = range(1, len(example.ids_T))
            pairs = [
                (logits[0, at - 1], int(example.ids_T[at]))
                for at in places
                if example.supervised_T[at]
            ]
        for scores, target in pairs:
            log_p = scores - scores.exp().sum().log()
            total = total - (1 - smoothing) * log_p[target] - smoothing * log_p.mean()
    return total


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_causal_loss_is_the_definition(tokenizer: Any, pairs: Any, smoothing: float) -> None:
    model = llama().double()
    data = load_data(pairs[:6], tokenizer)
    batch = batch_of(data, range(6))
    loss = batch_loss(model, batch, smoothing=smoothing)
    assert batch.weight == sum(int(example.supervised_T.sum()) for example in data.examples)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, slow_loss(model, data, smoothing), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_loss_is_the_definition(tokenizer: Any, smoothing: float) -> None:
    model = bert(labels=3).double()
    data = load_data([{"text": "ab" * at, "label": at} for at in range(1, 4)], tokenizer)
    batch = batch_of(data, range(3))
    loss = batch_loss(model, batch, smoothing=smoothing)
    torch.testing.assert_close(loss, slow_loss(model, data, smoothing), rtol=1e-10, atol=1e-10)


def test_a_model_that_knows_no_logits_to_keep_gives_the_same(tokenizer: Any, pairs: Any) -> None:
    model = llama()

    class Plain(torch.nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return model(input_ids=input_ids, attention_mask=attention_mask)

    data = load_data(pairs[:6], tokenizer)
    batch = batch_of(data, range(6))
    torch.testing.assert_close(batch_loss(Plain(), batch), batch_loss(model, batch))


def test_half_precision_logits_are_summed_in_float32(tokenizer: Any, pairs: Any) -> None:
    data = load_data(pairs[:6], tokenizer)
    batch = batch_of(data, range(6))
    assert batch_loss(llama().bfloat16(), batch).dtype == torch.float32


def test_task_and_model_must_agree(tokenizer: Any, pairs: Any) -> None:
    data = load_data(pairs[:2], tokenizer)
    with pytest.raises(TrainError, match="causal language model"):
        batch_loss(bert(), batch_of(data, [0, 1]))
    data = load_data([{"text": "ab", "label": 0}], tokenizer)
    with pytest.raises(TrainError, match="classification model"):
        batch_loss(llama(), batch_of(data, [0]))
