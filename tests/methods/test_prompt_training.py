"""Prompt and prefix tuning while they are trained: loss, gradients, and what they learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from sidepath.base import embedded_base
from sidepath.config import TrainConfig
from sidepath.data.dataset import load_data
from sidepath.errors import DataError
from sidepath.methods.base import Method
from sidepath.methods.prefix import PrefixTuning
from sidepath.methods.prompt import PromptTuning
from sidepath.store.adapter import inject
from sidepath.store.memory import switch_checkpointing
from sidepath.training.loop import train
from tests.methods.architectures import ARCHITECTURES
from tests.methods.kit import left_padded, require_one_loss, rows
from tests.methods.test_prompt import COUNT, prompted
from tests.training.kit import llama


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_loss_and_its_gradient_are_those_of_the_slow_way(name: str) -> None:
    plain, model, own_PD = prompted(name)
    ids_BT = torch.stack([rows()[0], rows()[0].flip(0)])
    out = model(input_ids=ids_BT, labels=ids_BT)
    out.loss.backward()
    assert isinstance(own_PD, nn.Parameter)
    found = own_PD.grad
    own = own_PD.detach().clone().requires_grad_(True)
    x_BTD = torch.cat([own.expand(2, -1, -1), plain.get_input_embeddings()(ids_BT)], 1)
    # The caller's way predicts no first token, the other predicts it from the prompt.
    logits = plain(inputs_embeds=x_BTD).logits[:, COUNT:-1]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten())
    expected.backward()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(found, own.grad, rtol=1e-4, atol=1e-7)


def test_the_fused_head_sees_the_rows_own_positions() -> None:
    _, model, own_PD = prompted("llama")
    assert isinstance(own_PD, nn.Parameter)
    require_one_loss(model, [own_PD])


@pytest.mark.parametrize("every_layer", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing_gives_the_same_gradient(name: str, every_layer: bool) -> None:
    model = ARCHITECTURES[name]()
    adapter = inject(model, PromptTuning(tokens=COUNT, every_layer=every_layer), "p")
    own_PD = list(adapter.parameters())[-1]
    found: list[Any] = []
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for on in (False, True):
        switch_checkpointing(model, on=on)
        own_PD.grad = None
        model(**left_padded(), use_cache=False).logits.square().sum().backward()
        found.append(own_PD.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("method", "rate"),
    [(PromptTuning(tokens=6), 0.03), (PrefixTuning(tokens=6, hidden=32), 0.01)],
    ids=["prompt", "prefix"],
)
def test_training_lowers_the_loss_and_leaves_the_base(method: Method, rate: float) -> None:
    folder = embedded_base()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    base = {name: p.clone() for name, p in model.named_parameters()}
    inject(model, method, "p")
    pairs = [{"prompt": f"{n} and {n + 1}:", "completion": " zip zap zop"} for n in range(40)]
    data = load_data(pairs, tokenizer, max_tokens=58)
    config = TrainConfig(steps=25, learning_rate=rate, warmup=0.0)
    steps = list(train(model, data, config))
    assert steps[-1].loss < 0.7 * steps[0].loss
    found = dict(model.named_parameters())
    assert all(torch.equal(found[name], tensor) for name, tensor in base.items())


def test_rows_must_fit_beside_the_prompt(tokenizer: Any) -> None:
    model = llama(context=64)
    inject(model, PromptTuning(tokens=6), "p")
    longer = load_data([{"prompt": "a" * 40, "completion": "b" * 40}], tokenizer, max_tokens=60)
    with pytest.raises(DataError, match="context is 64, less 6 that the adapter takes"):
        next(iter(train(model, longer, TrainConfig(steps=1))))
