"""Forgetting: an untouched adapter forgets nothing, and the figure is the KL it claims to be."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import sidepath
from sidepath import LoRA
from sidepath.data.dataset import load_data
from sidepath.errors import DataError, MergeError, UnknownAdapter
from sidepath.training.evaluate import evaluate
from sidepath.training.forgetting import SAMPLED, begin_token, forgetting
from tests.conftest import randomise, tiny_gpt2
from tests.training.kit import bert, llama, with_lora

VOCAB = 6
END = 5


def small(cls: str = "llama") -> Any:
    """A decoder over six tokens, the last of which ends a text, with a moved adapter."""
    torch.manual_seed(3)
    if cls == "llama":
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            initializer_range=0.4,
            bos_token_id=0,
            eos_token_id=END,
        )
        return LlamaForCausalLM(config).eval()
    settings = GPT2Config(
        vocab_size=VOCAB,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=16,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=END,
    )
    return GPT2LMHeadModel(settings).eval()


TOKENS = SimpleNamespace(bos_token_id=0, eos_token_id=END)


def texts_of(length: int) -> list[list[int]]:
    """Every text of at most `length` tokens after the begin token: it stops at the end token."""
    found = set()
    for tail in itertools.product(range(VOCAB), repeat=length):
        cut = tail.index(END) + 1 if END in tail else length
        found.add((0, *tail[:cut]))
    return [list(text) for text in sorted(found)]


def log_chance(model: Any, text: list[int]) -> float:
    """The log probability of a text after its begin token, one token at a time."""
    total = 0.0
    with torch.no_grad():
        for at in range(1, len(text)):
            logits = model(torch.tensor([text[:at]])).logits[0, -1].double()
            total += float(logits.log_softmax(-1)[text[at]])
    return total


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_difference_is_the_kl_of_base_and_adapted(kind: str) -> None:
    model = small(kind)
    adapter = sidepath.inject(model, LoRA(r=2), "a")
    randomise(adapter.parameters(), std=0.3)
    with sidepath.disabled(model):
        base = {tuple(text): log_chance(model, text) for text in texts_of(3)}
    tuned = {text: log_chance(model, list(text)) for text in base}
    assert math.fsum(map(math.exp, base.values())) == pytest.approx(1, abs=1e-5)
    kl = math.fsum(math.exp(p) * (p - tuned[text]) for text, p in base.items())
    length = math.fsum(math.exp(p) * (len(text) - 1) for text, p in base.items())
    assert kl / length > 0.01
    found = forgetting(model, TOKENS, rows=3000, tokens=3, seed=1)
    assert found is not None
    assert 0 < found.error < 0.1 * kl / length
    assert abs(found.difference - kl / length) < 4 * found.error
    entropy = -math.fsum(math.exp(p) * p for p in base.values())
    assert found.before == pytest.approx(entropy / length, rel=0.05), "the base's own entropy"
    assert found.tokens == pytest.approx(3000 * length, rel=0.05)


def test_the_error_is_the_spread_over_seeds() -> None:
    model = small()
    randomise(sidepath.inject(model, LoRA(r=2), "a").parameters(), std=0.3)
    runs = [forgetting(model, TOKENS, rows=60, tokens=3, seed=seed) for seed in range(60)]
    differences = [run.difference for run in runs if run is not None]
    claimed = np.mean([run.error for run in runs if run is not None])
    # The spread of 60 draws is itself known to 1/sqrt(2 * 59), 9 %.
    assert np.std(differences, ddof=1) == pytest.approx(claimed, rel=0.4)


def test_a_fresh_adapter_forgets_nothing_and_a_wrecked_one_much(real: tuple[Any, Any]) -> None:
    from copy import deepcopy

    model, tokenizer = deepcopy(real[0]), real[1]
    adapter = sidepath.inject(model, LoRA(r=4), "a")
    fresh = forgetting(model, tokenizer)
    assert fresh is not None
    assert fresh.difference == 0.0
    assert fresh.error == 0.0
    assert fresh.source == SAMPLED
    assert 200 < fresh.tokens <= 16 * 64
    assert 0 < fresh.before < 3, "a trained model knows its own text"
    assert forgetting(model, tokenizer) == fresh, "the same seed, the same figures"
    assert forgetting(model, tokenizer, seed=1) != fresh
    randomise(adapter.parameters(), std=0.5)
    wrecked = forgetting(model, tokenizer)
    assert wrecked is not None
    assert wrecked.before == fresh.before
    assert wrecked.difference > 1.0
    assert wrecked.as_dict()["difference"] == wrecked.difference


def test_nothing_is_disturbed(tokenizer: Any) -> None:
    model = with_lora(with_lora(llama(), "a", dropout=0.5), "b")
    model.train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    state, numpy = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].tolist()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sidepath.activate(model, None)
    with sidepath.route(model, ["b"]), sidepath.disabled(model):
        first = forgetting(model, tokenizer, adapter="a", rows=3, tokens=8)
    assert first == forgetting(model, tokenizer, adapter="a", rows=3, tokens=8)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert numpy == np.random.get_state(legacy=False)["state"]["key"].tolist()
    after = model.state_dict()
    assert all(torch.equal(tensors[name], after[name]) for name in tensors)
    with pytest.raises(UnknownAdapter):
        forgetting(model, tokenizer)  # none is active


def test_the_adapter_named_is_the_one_measured(tokenizer: Any) -> None:
    model = with_lora(with_lora(llama(), "a"), "b")
    randomise(p for name, p in model.named_parameters() if "@a" in name)
    sidepath.activate(model, "b")
    moved = forgetting(model, tokenizer, adapter="a", rows=4, tokens=8)
    still = forgetting(model, tokenizer, rows=4, tokens=8)
    assert moved is not None
    assert still is not None
    assert moved.difference != 0.0
    assert still.difference == 0.0


def test_on_the_users_own_text(tokenizer: Any, pairs: list[dict[str, str]]) -> None:
    data = load_data(pairs, tokenizer)
    model = with_lora(llama(), "a")
    randomise(p for name, p in model.named_parameters() if "@a" in name)
    found = forgetting(model, tokenizer, data=data)
    assert found is not None
    assert found.source == data.name
    assert found.tokens == sum(int(example.supervised_T[1:].sum()) for example in data.examples)
    assert found.after == pytest.approx(evaluate(model, data, metrics=["loss"])["loss"], rel=1e-6)
    with sidepath.disabled(model):
        before = evaluate(model, data, metrics=["loss"])["loss"]
    assert found.before == pytest.approx(before, rel=1e-6)


def test_models_that_write_no_text_have_nothing_to_forget(tokenizer: Any) -> None:
    model = bert()
    sidepath.inject(model, LoRA(r=2), "a")
    assert forgetting(model, tokenizer) is None


def test_where_a_text_begins(tokenizer: Any) -> None:
    model = tiny_gpt2()
    assert begin_token(model, tokenizer) == 0
    chat = SimpleNamespace(bos_token_id=None, eos_token_id=7)
    model.config.bos_token_id = 9
    assert begin_token(model, chat) == 9
    model.config.bos_token_id = None
    assert begin_token(model, chat) == 7
    tokenizer.bos_token = tokenizer.eos_token = None
    assert tokenizer.decode([begin_token(model, tokenizer)]) == " "

    class Mute:
        """A tokenizer that knows no token at all."""

        bos_token_id = eos_token_id = None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            """No tokens."""
            return {"input_ids": []}

    with pytest.raises(DataError, match="nothing to start from"):
        begin_token(model, Mute())


def test_a_chat_tokenizer_without_a_begin_token() -> None:
    model = small()
    model.config.bos_token_id = None
    sidepath.inject(model, LoRA(r=2), "a")
    chat = SimpleNamespace(bos_token_id=None, eos_token_id=END)
    found = forgetting(model, chat, rows=4, tokens=100)
    assert found is not None
    assert found.difference == 0.0
    assert found.tokens <= 4 * 15, "the context ends a text too"


def test_bad_input(tokenizer: Any) -> None:
    model = llama()
    with pytest.raises(UnknownAdapter):
        forgetting(model, tokenizer)
    model = with_lora(model, "a")
    with pytest.raises(UnknownAdapter, match="other"):
        forgetting(model, tokenizer, adapter="other")
    labelled = load_data([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], tokenizer)
    with pytest.raises(DataError, match="predicted"):
        forgetting(model, tokenizer, data=labelled)
    sidepath.merge(model, "a")
    with pytest.raises(MergeError):
        forgetting(model, tokenizer)


def test_what_cannot_be_measured_is_said(tokenizer: Any) -> None:
    model = with_lora(llama(), "None")
    sidepath.activate(model, None)
    with pytest.raises(UnknownAdapter, match="no adapter is active"):
        forgetting(model, tokenizer)
    with pytest.raises(DataError, match="no text can be sampled"):
        forgetting(model, tokenizer, adapter="None", rows=0)
    context = model.config.max_position_embeddings
    long = load_data([{"text": "ab " * context}], tokenizer, max_tokens=2 * context)
    with pytest.raises(DataError, match="do not fit"):
        forgetting(model, tokenizer, adapter="None", data=long)


def test_the_adapter_named_leaves_its_own_room_in_the_context() -> None:
    model = small("gpt2")
    sidepath.inject(model, sidepath.PromptTuning(tokens=6), "a")
    sidepath.activate(model, None)
    found = forgetting(model, TOKENS, adapter="a", rows=40, tokens=16)
    assert found is not None
    assert found.tokens <= 40 * (16 - 6 - 1)
