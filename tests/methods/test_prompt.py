"""Prompt tuning against an explicit concatenation of embeddings, one unpadded row at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from sidepath.errors import ConfigError, MergeError, RoutingError, UnsupportedModule
from sidepath.injection.merging import merge
from sidepath.injection.registry import registry_of
from sidepath.injection.surgery import disabled, route
from sidepath.methods.lora import LoRA
from sidepath.methods.prompt import PromptTuning
from sidepath.store.adapter import Adapter, inject, load
from sidepath.store.plan import plan
from tests.conftest import randomise
from tests.methods.architectures import ARCHITECTURES
from tests.methods.kit import NEW, beams, generated, left_padded, rows

DECODERS = ["llama", "gpt2", "opt", "gemma", "mixture"]
ENCODERS = ["bert", "roberta"]
COUNT = 4


def prompted(name: str, count: int = COUNT) -> tuple[Any, Any, Tensor]:
    """The plain model, one with a prompt, and the prompt's embeddings."""
    plain, model = ARCHITECTURES[name](), ARCHITECTURES[name]()
    adapter = inject(model, PromptTuning(tokens=count), "p")
    randomise(adapter.parameters(), std=1.0)
    (own_PD,) = adapter.parameters()
    return plain, model, own_PD


@torch.no_grad()
def by_hand(plain: Any, own_PD: Tensor, ids_T: Tensor, **more: Any) -> Any:
    """The plain model called with the prompt's embeddings and the row's, put together."""
    x_BTD = torch.cat([own_PD, plain.get_input_embeddings()(ids_T)])[None]
    return plain(inputs_embeds=x_BTD, **more)


@torch.no_grad()
def generated_by_hand(plain: Any, own_PD: Tensor, ids_T: Tensor, count: int) -> list[int]:
    """The likeliest tokens one after another, everything computed anew for each."""
    for _ in range(count):
        last_V = by_hand(plain, own_PD, ids_T).logits[0, -1]
        ids_T = torch.cat([ids_T, last_V.argmax()[None]])
    found: list[int] = ids_T[-count:].tolist()
    return found


@pytest.mark.parametrize("name", DECODERS)
def test_logits_are_those_of_the_embeddings_put_together(name: str) -> None:
    plain, model, own_PD = prompted(name)
    for ids_T in rows():
        expected = by_hand(plain, own_PD, ids_T).logits[:, COUNT:]
        with torch.no_grad():
            found = model(input_ids=ids_T[None]).logits
            embedded = model(inputs_embeds=plain.get_input_embeddings()(ids_T)[None]).logits
        assert found.shape == (1, len(ids_T), 64)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(embedded, expected)


@pytest.mark.parametrize("positions", [False, True], ids=["counted", "given"])
@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_a_row_padded_on_the_left_answers_as_alone(name: str, positions: bool) -> None:
    plain, model, own_PD = prompted(name)
    batch = left_padded()
    if positions:
        first = 1 if name == "roberta" else 0
        places = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        batch["position_ids"] = places + first
    with torch.no_grad():
        if name in ENCODERS:  # of a classifier only the body has an output a token
            found = model.base_model(**batch).last_hidden_state
        else:
            found = model(**batch).logits
    for row, ids_T in enumerate(rows()):
        out = by_hand(plain.base_model if name in ENCODERS else plain, own_PD, ids_T)
        whole = out.last_hidden_state if name in ENCODERS else out.logits
        torch.testing.assert_close(found[row, -len(ids_T) :], whole[0, COUNT:])


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_it_generates_the_tokens_of_the_slow_way(name: str, cached: bool) -> None:
    plain, model, own_PD = prompted(name)
    wanted = [generated_by_hand(plain, own_PD, ids_T, NEW) for ids_T in rows()]
    assert generated(model, cached) == wanted
    assert torch.equal(*beams(model))


def test_a_pooler_looks_at_the_first_token_and_not_at_the_prompt() -> None:
    plain, model, own_PD = prompted("bert")
    ids_T = rows()[0]
    hidden = by_hand(plain.base_model, own_PD, ids_T).last_hidden_state[:, COUNT:]
    with torch.no_grad():
        expected = plain.classifier(plain.base_model.pooler(hidden))
        types = torch.zeros_like(ids_T)[None]
        assert torch.allclose(model(ids_T[None]).logits, expected, atol=1e-6)
        assert torch.allclose(model(ids_T[None], None, types).logits, expected, atol=1e-6)
        as_tuple = model(ids_T[None], return_dict=False)
    assert torch.allclose(as_tuple[0], expected, atol=1e-6)


def test_hidden_states_and_attentions_have_the_callers_length() -> None:
    plain, model, own_PD = prompted("llama")
    model.set_attn_implementation("eager")
    ids_T = rows()[0]
    with torch.no_grad():
        out = model(ids_T[None], output_hidden_states=True, output_attentions=True)
    whole = by_hand(plain, own_PD, ids_T, output_hidden_states=True)
    assert len(out.hidden_states) == len(whole.hidden_states)
    for found, expected in zip(out.hidden_states, whole.hidden_states, strict=True):
        torch.testing.assert_close(found, expected[:, COUNT:])
    assert out.attentions[0].shape == (1, 4, len(ids_T), COUNT + len(ids_T))
    with torch.no_grad(), disabled(model):
        base = model(ids_T[None], output_hidden_states=True)
    assert len(base.hidden_states) == len(whole.hidden_states)


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2"])
def test_the_start_is_made_of_the_vocabularys_embeddings(name: str) -> None:
    model = ARCHITECTURES[name]()
    table = model.get_input_embeddings()(torch.arange(64))
    (own_PD,) = inject(model, PromptTuning(tokens=8), "p").parameters()
    apart = (own_PD.detach()[:, None] - table.detach()).abs().amax(dim=2)
    assert apart.min(dim=1).values.max() < 1e-6
    (drawn_PD,) = inject(model, PromptTuning(tokens=50, start="normal"), "n").parameters()
    ratio = drawn_PD.detach().std() / table.detach().std()
    assert 0.9 < float(ratio) < 1.1


def test_a_cache_is_begun_once_and_never_guessed_at() -> None:
    plain, model, own_PD = prompted("llama")
    ids_T = rows()[0]
    with torch.no_grad():
        first = model(ids_T[None, :4], use_cache=True)
        assert first.past_key_values.get_seq_length() == COUNT + 4
        second = model(ids_T[None, 4:], past_key_values=first.past_key_values)
    expected = by_hand(plain, own_PD, ids_T).logits[:, COUNT:]
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), expected)
    with torch.no_grad(), disabled(model):
        foreign = model(ids_T[None, :4], use_cache=True).past_key_values
    with pytest.raises(RoutingError, match="begun without this adapter"):
        model(ids_T[None, 4:], past_key_values=foreign)
    with pytest.raises(RoutingError, match="cache of fixed size"):
        model.generate(ids_T[None], max_new_tokens=2, cache_implementation="static")


@pytest.mark.parametrize("masked", [False, True])
def test_a_caller_who_counts_the_prompt_as_his_own_tokens_is_told(masked: bool) -> None:
    _, model, _ = prompted("llama")
    batch = left_padded() if masked else {"input_ids": rows()[0][None]}
    out = model.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0,
                         return_dict_in_generate=True)  # fmt: skip
    again = {"input_ids": torch.cat([out.sequences, out.sequences], 1)}
    if masked:
        new = torch.ones(3, 3 + out.sequences.shape[1], dtype=torch.long)
        again["attention_mask"] = torch.cat([batch["attention_mask"], new], 1)
    with pytest.raises(RoutingError, match="tokens of its own"):
        model.generate(**again, past_key_values=out.past_key_values, max_new_tokens=2,
                       do_sample=False, pad_token_id=0)  # fmt: skip


def test_rows_of_several_adapters_are_refused_and_others_are_not() -> None:
    plain, model, _ = prompted("llama")
    inject(model, LoRA(), "l")
    ids_BT = torch.stack([rows()[0], rows()[0]])
    with pytest.raises(RoutingError, match="cannot be routed") as error, route(model, ["p", "l"]):
        model(ids_BT)
    assert '"p"' in str(error.value)
    with torch.no_grad(), route(model, [None, "l"]):
        assert torch.equal(model(ids_BT).logits[:1], plain(ids_BT).logits[:1])


def test_packed_rows_are_refused() -> None:
    _, model, _ = prompted("llama")
    with pytest.raises(RoutingError, match="several examples in one row"):
        model(rows()[0][None], position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False)


def test_a_prompt_longer_than_the_context_names_both_numbers() -> None:
    for name, room in (("llama", 64), ("gpt2", 64), ("roberta", 63)):
        model = ARCHITECTURES[name]()
        with pytest.raises(ConfigError) as error:
            inject(model, PromptTuning(tokens=room), "p")
        assert f"found: {room} positions" in str(error.value)
        assert f"context of {room}" in str(error.value)
        assert registry_of(model) is None
        inject(model, PromptTuning(tokens=room - 1), "p")


def test_a_body_without_a_head_and_a_merge_are_refused() -> None:
    config = ARCHITECTURES["llama"]().config
    with pytest.raises(UnsupportedModule, match="no head"):
        inject(transformers.LlamaModel(config), PromptTuning())
    _, model, _ = prompted("llama")
    with pytest.raises(MergeError, match="layers of its own"):
        merge(model, "p")


def test_the_plan_says_what_context_it_eats() -> None:
    planned = plan(ARCHITECTURES["llama"](), PromptTuning(tokens=20), tokens=500)
    assert (planned.positions, planned.context, planned.tokens) == (20, 64, 44)
    assert "context      20 of 64 positions are the adapter's" in str(planned)
    assert planned.as_dict()["positions"] == 20
    assert planned.memory.activations is not None
    assert planned.trainable == 20 * 32


def test_saved_and_loaded_it_generates_alike(tmp_path: Path) -> None:
    plain, model, _ = prompted("llama")
    load(plain, Adapter("p", model).save(tmp_path / "p"), "again")
    ids = rows()[0][None]
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **settings), plain.generate(ids, **settings))
    with disabled(plain):
        assert not torch.equal(plain(ids).logits, model(ids).logits)


@pytest.mark.parametrize(("name", "refused"), [("gpt2", True), ("opt", True), ("llama", False)])
def test_a_row_that_no_learned_position_is_left_for_is_refused(name: str, refused: bool) -> None:
    _, model, _ = prompted(name)
    ids = torch.full((1, 64 - COUNT), 5)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        if refused:
            with pytest.raises(RoutingError, match="longer than the model's context"):
                model(ids[:, :1], past_key_values=cache)
            with pytest.raises(RoutingError) as error:
                model(torch.full((1, 64), 5))
            assert f"64 tokens behind {COUNT} trained positions" in str(error.value)
        else:  # rotary positions go on, as they do without an adapter
            model(torch.full((1, 64), 5))
