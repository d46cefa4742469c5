"""Prompt tuning against an explicit concatenation of embeddings, one unpadded row at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from sidepath.base import embedded_base
from sidepath.config import TrainConfig
from sidepath.data.dataset import load_data
from sidepath.data.example import Example
from sidepath.errors import ConfigError, DataError, MergeError, RoutingError, UnsupportedModule
from sidepath.injection.merging import merge
from sidepath.injection.registry import registry_of
from sidepath.injection.surgery import disabled, route, use_kernels
from sidepath.methods.base import Method
from sidepath.methods.lora import LoRA
from sidepath.methods.prefix import PrefixTuning
from sidepath.methods.prompt import PromptTuning
from sidepath.store.adapter import Adapter, inject, load
from sidepath.store.memory import switch_checkpointing
from sidepath.store.plan import plan
from sidepath.training.batching import collate
from sidepath.training.loop import train
from sidepath.training.loss import batch_loss
from tests.conftest import randomise
from tests.methods.architectures import ARCHITECTURES
from tests.training.kit import llama

DECODERS = ["llama", "gpt2", "opt", "gemma", "mixture"]
ENCODERS = ["bert", "roberta"]
COUNT = 4
LENGTHS = (6, 3, 5)


def prompted(name: str, count: int = COUNT) -> tuple[nn.Module, nn.Module, Tensor]:
    """The plain model, one with a prompt, and the prompt's embeddings."""
    plain, model = ARCHITECTURES[name](), ARCHITECTURES[name]()
    adapter = inject(model, PromptTuning(tokens=count), "p")
    randomise(adapter.parameters(), std=1.0)
    (own_PD,) = adapter.parameters()
    return plain, model, own_PD


def rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 64, (length,), generator=generator) for length in LENGTHS]


def left_padded() -> dict[str, Tensor]:
    width = max(LENGTHS)
    ids = [nn.functional.pad(ids_T, (width - len(ids_T), 0)) for ids_T in rows()]
    mask = [nn.functional.pad(torch.ones_like(i), (width - len(i), 0)) for i in rows()]
    return {"input_ids": torch.stack(ids), "attention_mask": torch.stack(mask)}


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
    model.generation_config.eos_token_id = None
    batch = left_padded()
    out = model.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=cached,
                         pad_token_id=0)  # fmt: skip
    found = out[:, batch["input_ids"].shape[1] :].tolist()
    for row, ids_T in enumerate(rows()):
        assert found[row] == generated_by_hand(plain, own_PD, ids_T, 6)
    beams = [
        model.generate(input_ids=rows()[0][None], max_new_tokens=6, do_sample=False, num_beams=3,
                       pad_token_id=0, use_cache=use_cache)
        for use_cache in (True, False)
    ]  # fmt: skip
    assert torch.equal(*beams)


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
    batch = collate(
        [Example(ids_T.numpy().astype(np.int32), np.arange(len(ids_T)) > 1, line=at)
         for at, ids_T in enumerate(rows())], range(3), 0,
    )  # fmt: skip
    assert isinstance(own_PD, nn.Parameter)
    losses, gradients = [], []
    for kernels in ("fused", "plain"):
        use_kernels(model, kernels)  # type: ignore[arg-type]
        own_PD.grad = None
        loss = batch_loss(model, batch)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(own_PD.grad)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize(("lp", "printed"), [(32, 0.4), (64, 0.9), (128, 1.7)])
def test_the_counts_of_the_lora_papers_prefix_embedding(lp: int, printed: float) -> None:
    """LoRA's Table 15, with l_i = 8 more at the end: d (l_p + l_i) for GPT-3's d of 12,288."""
    with torch.device("meta"):
        config = transformers.GPT2Config(n_embd=12_288, n_layer=1, n_head=96, n_positions=2048)
        model = transformers.GPT2LMHeadModel(config)
    adapter = inject(model, PromptTuning(tokens=lp + 8), "p")
    count = sum(p.numel() for p in adapter.parameters())
    assert count == 12_288 * (lp + 8)
    assert abs(count / 1e6 - printed) <= 0.1


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


def layer_by_layer(plain: Any, own_LPD: Tensor, ids_T: Tensor) -> Tensor:
    """The plain model's logits (T, V), its layers called one by one on replaced activations."""
    body, count = plain.base_model, own_LPD.shape[1]
    places = torch.arange(count + len(ids_T))[None]
    x_BTD = torch.cat([own_LPD[0], plain.get_input_embeddings()(ids_T)])[None]
    gpt2 = body.config.model_type == "gpt2"
    if gpt2:
        x_BTD = x_BTD + body.wpe(places)
        layers, norm, more = body.h, body.ln_f, {}
    else:
        layers, norm = body.layers, body.norm
        more = {"position_embeddings": body.rotary_emb(x_BTD, position_ids=places)}
    for at, layer in enumerate(layers):
        if at:
            x_BTD = torch.cat([own_LPD[at][None], x_BTD[:, count:]], dim=1)
        x_BTD = layer(x_BTD, **more)
    logits: Tensor = plain.lm_head(norm(x_BTD))[0, count:]
    return logits


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_with_every_layer_it_is_the_papers_prefix_layer(name: str, tmp_path: Path) -> None:
    plain, model = ARCHITECTURES[name](), ARCHITECTURES[name]()
    adapter = inject(model, PromptTuning(tokens=COUNT, every_layer=True), "p")
    randomise(adapter.parameters(), std=1.0)
    embeddings_PD, later_NPD = adapter.parameters()
    own_LPD = torch.cat([embeddings_PD[None], later_NPD])
    assert own_LPD.shape == (2, COUNT, 32)
    with torch.no_grad():
        found = model(**left_padded()).logits
        for row, ids_T in enumerate(rows()):
            expected = layer_by_layer(plain, own_LPD, ids_T)
            torch.testing.assert_close(found[row, -len(ids_T) :], expected)
        without = by_hand(plain, embeddings_PD, rows()[0]).logits[0, COUNT:]
        assert not torch.allclose(without, layer_by_layer(plain, own_LPD, rows()[0]), atol=1e-3)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    slow = model.generate(**left_padded(), use_cache=False, **settings)
    assert torch.equal(model.generate(**left_padded(), **settings), slow)
    model(**left_padded()).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    load(plain, adapter.save(tmp_path / "p"), "again")
    with torch.no_grad():
        assert torch.equal(plain(**left_padded()).logits, found)


def test_the_printed_counts_of_the_papers_prefix_layer_are_above_its_formula() -> None:
    """LoRA's Table 15: `L d (l_p + l_i)` is what section 5.1 says; printed are 0.8 to 8 % more."""
    with torch.device("meta"):
        config = transformers.GPT2Config(n_embd=12_288, n_layer=96, n_head=96, n_positions=2048)
        model = transformers.GPT2LMHeadModel(config)
    printed = {2 + 2: 5.1, 8 + 0: 10.1, 8 + 8: 20.2, 32 + 4: 44.1, 64 + 0: 76.1}
    for tokens, millions in printed.items():
        adapter = inject(model, PromptTuning(tokens=tokens, every_layer=True), f"p{tokens}")
        count = sum(p.numel() for p in adapter.parameters())
        assert count == 96 * 12_288 * tokens
        assert 1.005 < millions / (count / 1e6) < 1.085


def test_layers_of_another_width_than_the_embeddings_are_refused() -> None:
    config = transformers.OPTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, vocab_size=64,
        max_position_embeddings=64, word_embed_proj_dim=16, pad_token_id=0,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config).eval()
    with pytest.raises(UnsupportedModule, match="as wide as the embeddings"):
        inject(model, PromptTuning(tokens=2, every_layer=True))
    (own_PD,) = inject(model, PromptTuning(tokens=2)).parameters()
    assert own_PD.shape == (2, 16)
    model(rows()[0][None])
