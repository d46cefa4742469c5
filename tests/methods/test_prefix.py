"""Prefix tuning against explicit `past_key_values`, one unpadded row at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import DynamicCache

from sidepath.errors import ConfigError, MergeError, RoutingError, TrainError
from sidepath.injection.merging import merge
from sidepath.injection.registry import registry_of, require_registry
from sidepath.injection.surgery import disabled, route
from sidepath.methods.lora import LoRA
from sidepath.methods.prefix import Prefix, PrefixTuning
from sidepath.methods.prompt import PromptTuning
from sidepath.store.adapter import Adapter, inject, load
from sidepath.store.memory import switch_checkpointing
from sidepath.store.plan import plan
from sidepath.store.sums import add_up
from sidepath.training.loss import batch_loss
from tests.conftest import randomise
from tests.methods.architectures import ARCHITECTURES
from tests.methods.kit import (
    NEW,
    beams,
    generated,
    left_padded,
    require_one_loss,
    rows,
    supervised,
)

COUNT = 4
DECODERS = ["llama", "qwen2", "mistral", "gemma", "gpt2", "opt", "mixture"]


def prefixed(name: str, hidden: int | None = 24) -> tuple[nn.Module, nn.Module, Prefix]:
    """The plain model, one with a prefix, and the prefix."""
    plain, model = ARCHITECTURES[name](), ARCHITECTURES[name]()
    adapter = inject(model, PrefixTuning(tokens=COUNT, hidden=hidden), "p")
    randomise(adapter.parameters(), std=0.5)
    (delta,) = adapter.deltas.values()
    assert isinstance(delta, Prefix)
    return plain, model, delta


def by_hand(plain: Any, keys: Tensor, values: Tensor, ids_T: Tensor) -> Tensor:
    """The plain model's logits (T, V) with a cache that holds the prefix."""
    cache = DynamicCache(config=plain.config)
    for layer in range(len(keys)):
        cache.update(keys[layer][None], values[layer][None], layer)
    places = torch.arange(len(ids_T))[None] + COUNT
    out = plain(ids_T[None], past_key_values=cache, position_ids=places, use_cache=True)
    logits: Tensor = out.logits[0]
    return logits


def generated_by_hand(plain: Any, delta: Prefix, ids_T: Tensor, count: int) -> list[int]:
    """The likeliest tokens one after another, everything computed anew for each."""
    for _ in range(count):
        with torch.no_grad():
            last_V = by_hand(plain, *delta.prefix(), ids_T)[-1]
        ids_T = torch.cat([ids_T, last_V.argmax()[None]])
    found: list[int] = ids_T[-count:].tolist()
    return found


@pytest.mark.parametrize("hidden", [24, None], ids=["network", "plain"])
@pytest.mark.parametrize("name", DECODERS)
def test_logits_are_those_of_an_explicit_cache(name: str, hidden: int | None) -> None:
    plain, model, delta = prefixed(name, hidden)
    for ids_T in rows():
        with torch.no_grad():
            expected = by_hand(plain, *delta.prefix(), ids_T)
            assert not torch.allclose(plain(ids_T[None]).logits[0], expected, atol=1e-4)
            for use_cache in (True, False):
                found = model(input_ids=ids_T[None], use_cache=use_cache)
                torch.testing.assert_close(found.logits[0], expected)
                assert (found.past_key_values is not None) == use_cache


@pytest.mark.parametrize("positions", [False, True], ids=["counted", "given"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_row_padded_on_the_left_answers_as_alone(name: str, positions: bool) -> None:
    plain, model, delta = prefixed(name)
    batch = left_padded()
    if positions:
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = model(**batch).logits
        for row, ids_T in enumerate(rows()):
            expected = by_hand(plain, *delta.prefix(), ids_T)
            torch.testing.assert_close(found[row, -len(ids_T) :], expected)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_are_those_of_the_slow_way(name: str) -> None:
    plain, model, delta = prefixed(name)
    ids_T = rows()[0]
    model(ids_T[None], use_cache=False).logits.square().sum().backward()
    found = {key: p.grad for key, p in delta.named_parameters()}
    assert len(found) == 5
    delta.zero_grad(set_to_none=True)
    by_hand(plain, *delta.prefix(), ids_T).square().sum().backward()
    for key, parameter in delta.named_parameters():
        torch.testing.assert_close(found[key], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "opt"])
def test_it_generates_the_tokens_of_the_slow_way(name: str, cached: bool) -> None:
    plain, model, delta = prefixed(name)
    wanted = [generated_by_hand(plain, delta, ids_T, NEW) for ids_T in rows()]
    assert generated(model, cached) == wanted
    assert torch.equal(*beams(model))


def test_the_fused_head_sees_the_prefix() -> None:
    _, model, delta = prefixed("llama")
    loss = require_one_loss(model.train(), delta.parameters())
    with disabled(model), torch.no_grad():
        assert not torch.allclose(batch_loss(model, supervised()), loss, atol=1e-4)


def test_saved_it_is_keys_and_values_that_answer_alike(tmp_path: Path) -> None:
    plain, model, delta = prefixed("llama")
    assert delta.network is not None
    folder = Adapter("p", model).save(tmp_path / "p")
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_tensor(key).shape) for key in file.keys()}  # noqa: SIM118
    assert shapes == {"model.keys": (2, 2, COUNT, 8), "model.values": (2, 2, COUNT, 8)}
    again = load(plain, folder, "again", trainable=True)
    (loaded,) = again.deltas.values()
    assert isinstance(loaded, Prefix)
    assert loaded.network is None
    assert sorted(name for name, _ in loaded.named_parameters()) == ["keys", "values"]
    batch = left_padded()
    with torch.no_grad():
        assert torch.equal(plain(**batch).logits, model(**batch).logits)
    second = again.save(tmp_path / "second")
    name = "adapter_model.safetensors"
    assert (second / name).read_bytes() == (folder / name).read_bytes()


def test_a_cache_is_begun_once_and_never_guessed_at() -> None:
    plain, model, delta = prefixed("llama")
    ids_T = rows()[0]
    with torch.no_grad():
        cache = DynamicCache()
        first = model(ids_T[None, :4], past_key_values=cache)
        assert cache.get_seq_length() == COUNT + 4
        second = model(ids_T[None, 4:], past_key_values=cache)
        expected = by_hand(plain, *delta.prefix(), ids_T)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1)[0], expected)
    inject(model, PromptTuning(tokens=2), "other")
    with pytest.raises(RoutingError, match="begun without this adapter"):
        model(ids_T[None, 4:], past_key_values=cache)
    with pytest.raises(RoutingError, match="cannot be routed"), route(model, ["p"]):
        model(ids_T[None])
    cache.reset()
    with torch.no_grad():
        model(ids_T[None], past_key_values=cache)
    assert cache.get_seq_length() == 2 + len(ids_T)


def test_gradient_checkpointing_is_refused_and_the_plan_knows() -> None:
    _, model, _ = prefixed("llama")
    switch_checkpointing(model, on=True)
    model(rows()[0][None])
    with pytest.raises(TrainError, match="drops the cache"):
        model.train()(rows()[0][None])
    planned = plan(ARCHITECTURES["llama"](), PrefixTuning(tokens=COUNT, hidden=24), tokens=8)
    assert planned.memory.activations_plain is not None
    assert planned.memory.activations_checkpointed is None
    saved = 2 * 2 * COUNT * 2 * 8
    network = COUNT * 32 + 24 * (32 + 1) + saved // COUNT * (24 + 1)
    assert planned.trainable == network
    assert saved * 4 < planned.adapter_bytes < saved * 4 + 400
    assert (planned.positions, planned.context) == (COUNT, 64)


def test_what_cannot_be_is_refused_with_its_reason() -> None:
    model = ARCHITECTURES["gpt2"]()
    with pytest.raises(ConfigError) as error:
        inject(model, PrefixTuning(tokens=70))
    assert "found: 70 positions" in str(error.value)
    assert "context of 64" in str(error.value)
    assert registry_of(model) is None
    with pytest.raises(ConfigError, match="hidden"):
        PrefixTuning(hidden=0)
    _, model, _ = prefixed("llama")
    with pytest.raises(MergeError, match="layers of its own"):
        merge(model, "p")


def test_the_published_counts() -> None:
    """Prefix tuning's GPT-2 medium at 5 positions, and Llama-3.2-3B's grouped heads at 200."""
    with torch.device("meta"):
        gpt2 = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16)
        )
        llama = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=64, hidden_size=3072, intermediate_size=64, num_hidden_layers=28,
                num_attention_heads=24, num_key_value_heads=8, head_dim=128,
            )
        )  # fmt: skip
    for model, tokens, published in ((gpt2, 5, 245_760), (llama, 200, 11_468_800)):
        adapter = inject(model, PrefixTuning(tokens=tokens, hidden=None))
        assert sum(p.numel() for p in adapter.parameters()) == published


def test_a_decoder_that_classifies_can_take_one() -> None:
    config = ARCHITECTURES["llama"]().config
    config.num_labels = 3
    torch.manual_seed(1)
    model = transformers.LlamaForSequenceClassification(config).eval()
    with torch.no_grad():
        before = model(**left_padded()).logits
        adapter = inject(model, PrefixTuning(tokens=COUNT, hidden=None))
        randomise(adapter.parameters(), std=0.5)
        found = model(**left_padded()).logits
        alone = torch.cat([model(ids_T[None]).logits for ids_T in rows()])
    torch.testing.assert_close(found, alone)
    assert not torch.allclose(found, before, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_base_of_less_precision_is_given_its_own_dtype(name: str) -> None:
    plain, model, delta = prefixed(name)
    with torch.no_grad():
        exact = torch.stack([by_hand(plain, *delta.prefix(), i)[-1] for i in rows()])
        with torch.autocast("cpu", torch.bfloat16):
            found = model(**left_padded()).logits[:, -1]
        torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.05)
        half = ARCHITECTURES[name]().to(torch.bfloat16)
        inject(half, PrefixTuning(tokens=COUNT, hidden=None), "p")
        (own,) = require_registry(half).adapter("p").deltas.values()
        own.take_(delta.tensors())
        out = half(**left_padded(), use_cache=True)
    assert all(parameter.dtype == torch.float32 for parameter in own.parameters())
    assert out.past_key_values.layers[0].keys.dtype == torch.bfloat16
    torch.testing.assert_close(out.logits[:, -1].float(), exact, rtol=0.05, atol=0.05)


def test_a_sum_with_another_adapter_is_refused_and_not_left_out() -> None:
    _, model, _ = prefixed("llama")
    inject(model, LoRA(), "l")
    add_up(model, ["p", "l"])
    with pytest.raises(RoutingError, match="cannot be put onto its output"):
        model(rows()[0][None])


def test_a_merge_is_refused_for_its_own_reason_over_tied_weights() -> None:
    model = ARCHITECTURES["gpt2"]()
    inject(model, PrefixTuning(tokens=3, hidden=None), "a")
    with pytest.raises(MergeError, match="layers of its own"):
        merge(model, "a")
