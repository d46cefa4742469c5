"""Where a frozen body has to run in each step, and a notice says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sidepath.config import TrainConfig
from sidepath.data.dataset import load_data
from sidepath.methods.base import Method
from sidepath.methods.lora import LoRA
from sidepath.methods.plain import FullFineTuning, LinearProbe
from sidepath.methods.prompt import PromptTuning
from sidepath.training.features import features_of
from sidepath.training.processes import Processes
from sidepath.training.sharding import shard
from sidepath.training.trained import trained_of
from tests.conftest import tiny_gpt2
from tests.methods.architectures import ARCHITECTURES
from tests.training.frozen import (
    CONFIG,
    ROWS_OF_PROOF,
    adapted,
    labelled,
    pairs,
    run,
)
from tests.training.joined import in_processes
from tests.training.kit import bert, llama


class ReadsPadding(nn.Module):
    """A head that takes the mean over all positions, those behind a row too."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        result: Tensor = self.inner(hidden_BTD.mean(dim=1))
        return result


def reads_padding() -> Any:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=128, num_labels=2,
    )  # fmt: skip
    model = RobertaForSequenceClassification(config).eval()
    model.classifier = ReadsPadding(nn.Linear(16, 2))
    return model


def gives_more() -> Any:
    model = bert()
    model.config.output_hidden_states = True
    return model


def called_with_more() -> Any:
    model = bert()
    own = model.forward

    def forward(input_ids: Tensor, attention_mask: Tensor) -> Any:
        return own(input_ids, attention_mask, token_type_ids=torch.zeros_like(input_ids))

    model.forward = forward
    return model


def called_twice() -> Any:
    model = bert()
    own = model.forward

    def forward(input_ids: Tensor, attention_mask: Tensor) -> Any:
        own(input_ids, attention_mask)
        return own(input_ids, attention_mask)

    model.forward = forward
    return model


@pytest.mark.parametrize(
    ("make", "changes", "said"),
    [
        (reads_padding, {}, "reads the padding"),
        (gives_more, {}, "something else than a vector"),
        (called_with_more, {}, "more than token ids"),
        (called_twice, {}, "the model calls it 2 times for a batch"),
        (bert, {"epochs": 1}, "no row is used twice"),
    ],
)
def test_what_is_not_understood_is_computed_in_each_step(
    make: Callable[[], Any], changes: dict[str, Any], said: str, tokenizer: Any
) -> None:
    data = load_data(labelled(), tokenizer)
    model = adapted(make())
    reports = run(model, data, TrainConfig(**{"epochs": 2, **changes}))
    assert said in reports[0].notices[0]
    assert reports[0].notices[0].startswith("the frozen body runs in each step")


def test_a_forward_of_the_modules_own_is_called_and_put_back(tokenizer: Any) -> None:
    """Accelerate's device maps put one there."""
    model, calls = bert(), []
    own = model.bert.forward

    def forward(*args: Any, **options: Any) -> Any:
        calls.append(len(args[0]))
        return own(*args, **options)

    model.bert.forward = forward
    data = load_data(labelled(), tokenizer)
    run(adapted(model), data)
    assert sum(calls) == len(data) + ROWS_OF_PROOF
    assert model.bert.__dict__["forward"] is forward


def test_packed_rows_are_computed_in_each_step(tokenizer: Any) -> None:
    data = load_data(pairs(), tokenizer, max_tokens=64)
    reports = run(adapted(llama()), data, TrainConfig(epochs=2, packing=True))
    assert reports[0].notices == ("the frozen body runs in each step: the rows are packed",)


def test_a_sharded_base_runs_equally_often_in_all_processes(tokenizer: Any, tmp_path: Path) -> None:
    data = load_data(pairs(), tokenizer)
    losses = [report.loss for report in run(adapted(llama()), data)]

    def work(processes: Processes) -> Any:
        model = adapted(llama())
        shard(model, processes)
        reports = run(model, data)
        return [[report.loss for report in reports], reports[0].notices[0]]

    for found, notice in in_processes(2, tmp_path, work):
        assert found == pytest.approx(losses, rel=1e-4)
        assert "the base is sharded" in notice


def test_a_compiled_model_is_left_as_it_is_compiled(tokenizer: Any) -> None:
    model = adapted(llama())
    model.compile(backend="eager")
    data = load_data(pairs(), tokenizer)
    found = features_of(trained_of(model, None), data, CONFIG, again=True)
    assert found.notice == "the frozen body runs in each step: the model is compiled"


@pytest.mark.parametrize(
    ("make", "config", "above"),
    [
        (bert, LinearProbe(), True),
        (bert, LoRA(r=1, targets=("classifier",)), True),
        (bert, LoRA(r=1, targets=("query",)), False),
        (bert, LinearProbe(train_whole=("head", "pooler")), False),
        (bert, FullFineTuning(top=1), False),
        (llama, PromptTuning(), False),
        (tiny_gpt2, LinearProbe(), True),  # whose head is the table of the body: a copy is trained
        (ARCHITECTURES["opt"], LinearProbe(), True),
        (ARCHITECTURES["t5"], LinearProbe(), False),  # no one call gives its features
    ],
)
def test_which_runs_train_nothing_in_the_body(
    make: Callable[[], Any], config: Method, above: bool, tokenizer: Any
) -> None:
    data = load_data(pairs(), tokenizer)
    found = features_of(trained_of(adapted(make(), config), None), data, CONFIG, again=False)
    assert (found.notice is not None) == above


def test_a_model_without_adapters_whose_head_alone_requires_gradients(tokenizer: Any) -> None:
    model = bert()
    model.bert.requires_grad_(False)
    data = load_data(labelled(), tokenizer)
    notice = features_of(trained_of(model, None), data, CONFIG, again=True).notice
    assert notice is not None
    assert "once" in notice
    tied = tiny_gpt2()
    tied.transformer.h.requires_grad_(False)  # type: ignore[union-attr, operator]
    assert features_of(trained_of(tied, None), data, CONFIG, again=True).notice is None
