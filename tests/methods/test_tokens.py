"""Rows of tokens: against a model whose own table was made longer, for every way of having one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sidepath
from sidepath import BitFit, LoRA
from sidepath.errors import ConfigError, MergeError, UnsupportedModule
from sidepath.injection.registry import registry_of, require_registry
from sidepath.store.adapter import inject
from sidepath.store.sums import add_up
from tests.conftest import outputs, randomise, tiny_gpt2, tiny_llama

SIZE = 64


def tiny_phi() -> Any:
    """A random Phi: its head has a bias, and is not tied."""
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(7)
    config = PhiConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        vocab_size=SIZE, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = PhiForCausalLM(config).eval()
    nn.init.normal_(model.lm_head.bias)
    return model


def tiny_gemma() -> Any:
    """A random Gemma 3: tied, and what is looked up is multiplied by a number."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(7)
    config = Gemma3TextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=SIZE, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "untied": lambda: tiny_llama(layers=1),
    "tied": lambda: tiny_llama(layers=1, tied=True),
    "gpt2": tiny_gpt2,
    "bias": tiny_phi,
    "scaled": tiny_gemma,
}
IDS = {"named": (9, 5), "added": (64, 65), "both": (65, 9, 64, 5)}
"""Rows that the base has, those that are added, and both, in any order."""
CASES = [*((name, "both") for name in MODELS), ("tied", "named"), ("untied", "added")]
PLAIN = torch.tensor([[3, 9, 5, 7, 9], [1, 2, 40, 5, 63]])


def injected(name: str, ids: tuple[int, ...]) -> Any:
    model = MODELS[name]()
    known = "c_attn" if name == "gpt2" else "q_proj"
    inject(model, LoRA(r=2, targets=(known,), token_rows=ids), "a")
    return model


def with_new(ids: tuple[int, ...]) -> Tensor:
    """Rows of tokens in which the trained ones stand too."""
    return torch.tensor([[3, *ids, 7][:4], [*ids, 40, 5, 63][:4]])


def rows_of(model: nn.Module) -> dict[str, Tensor]:
    """The trained rows by the module they stand at, tied ones once."""
    deltas: Mapping[str, Any] = require_registry(model).adapter("a").deltas
    return {
        path: delta.rows.detach() for path, delta in deltas.items() if "rows" in delta._parameters
    }


def resized(model: Any, ids: tuple[int, ...]) -> Any:
    """A plain model with these rows in its own tables, and the same low-rank update folded in."""
    own = rows_of(model)
    plain = copy.deepcopy(model)
    deltas = require_registry(plain).adapter("a").deltas
    kept = {path: one for path, one in deltas.items() if "A" in one.tensors()}
    weights = {
        path: one.folded(require_registry(plain).sides[path].view)["weight"]
        for path, one in kept.items()
    }
    sidepath.remove(plain, "a")
    plain.resize_token_embeddings(max(SIZE, *(one + 1 for one in ids)), mean_resizing=False)
    with torch.no_grad():
        for path, weight in weights.items():
            plain.get_submodule(path).weight.copy_(weight)
        for path, rows in own.items():
            plain.get_submodule(path).weight[list(ids)] = rows
        if getattr(plain.lm_head, "bias", None) is not None:
            plain.lm_head.bias[SIZE:] = 0
    return plain


@pytest.mark.parametrize(
    ("name", "kind", "dtype"),
    [
        *((name, kind, torch.float32) for name, kind in CASES),
        *((name, "both", torch.bfloat16) for name in ("tied", "scaled")),
    ],
)
def test_fresh_it_changes_nothing_and_removed_it_leaves_nothing(
    name: str, kind: str, dtype: torch.dtype
) -> None:
    ids = IDS[kind]
    model = MODELS[name]().to(dtype)
    expected = outputs(model, PLAIN)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    inject(model, LoRA(r=2, token_rows=ids), "a")
    length = max(SIZE, max(ids) + 1)
    found = outputs(model, PLAIN)
    assert found.shape[-1] == model.config.vocab_size == length
    assert torch.equal(found[..., :SIZE], expected)
    with sidepath.disabled(model):
        assert torch.equal(outputs(model, PLAIN), expected)
    randomise(require_registry(model).adapter("a").parameters())
    assert not torch.allclose(outputs(model, PLAIN)[..., :SIZE], expected)
    sidepath.remove(model, "a")
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert model.config.vocab_size == SIZE
    assert torch.equal(outputs(model, PLAIN), expected)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_it_is_the_model_whose_own_table_has_these_rows(name: str, kind: str) -> None:
    ids = IDS[kind]
    model = injected(name, ids)
    randomise(require_registry(model).adapter("a").parameters(), 0.3)
    expected = outputs(resized(model, ids), with_new(ids))
    torch.testing.assert_close(outputs(model, with_new(ids)), expected, rtol=1e-4, atol=1e-5)
    tied = name not in ("untied", "bias")
    assert len(rows_of(model)) == (1 if tied else 2)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    sidepath.merge(model, "a")
    torch.testing.assert_close(outputs(model, with_new(ids)), expected, rtol=1e-4, atol=1e-5)
    sidepath.unmerge(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["untied", "tied", "scaled"])
def test_gradients_are_those_of_the_longer_table(name: str) -> None:
    ids = IDS["both"]
    model = injected(name, ids)
    randomise(require_registry(model).adapter("a").parameters(), 0.3)
    plain = resized(model, ids).requires_grad_(True)
    labels = with_new(ids)
    for each in (model, plain):
        # transformers' own loss: it shapes the logits by the config's number of tokens.
        each(labels, labels=labels).loss.backward()
    for path, delta in require_registry(model).adapter("a").deltas.items():
        if "rows" in delta._parameters:
            expected = plain.get_submodule(path).weight.grad[list(ids)]
            torch.testing.assert_close(delta.rows.grad, expected, rtol=1e-4, atol=1e-6)
    own = {id(parameter) for parameter in require_registry(model).adapter("a").parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)


@pytest.mark.parametrize("gradients", [False, True], ids=["without", "with gradients"])
@pytest.mark.parametrize("order", [("a", None, "b", "c"), ("b", "a", None, "a")])
def test_each_row_has_the_tokens_of_its_own_adapter(
    order: tuple[str | None, ...], gradients: bool
) -> None:
    """Two adapters have other tokens at one id, and one of them more; a third updates the head."""
    model = tiny_llama()
    made = {
        "a": LoRA(r=2, token_rows=(64, 5)),
        "b": LoRA(r=2, token_rows=(64, 65)),
        "c": LoRA(r=2, targets=("q_proj",), train_whole=("lm_head",)),
    }
    for name, config in made.items():
        adapter = inject(model, config, name)
        randomise(adapter.parameters(), 0.3)
    known = {"a": [3, 64, 5], "b": [65, 64, 7], "c": [3, 4, 5], None: [3, 4, 5]}
    rows = torch.tensor([known[name] for name in order])
    alone = []
    for answering, row in zip(order, rows, strict=True):
        sidepath.activate(model, answering)
        alone.append(outputs(model, row[None])[0])
    with sidepath.route(model, order), torch.set_grad_enabled(gradients):
        found = model(rows).logits.detach()
    assert found.shape[-1] == 66
    for answering, row, expected in zip(order, found, alone, strict=True):
        size = expected.shape[-1]
        close = torch.equal if answering is None and not gradients else torch.allclose
        assert close(row[:, :size], expected) or torch.allclose(row[:, :size], expected, atol=1e-5)
        assert torch.equal(row[:, size:], torch.full_like(row[:, size:], -math.inf))
    sidepath.activate(model, "a")
    with pytest.raises(IndexError):
        model(torch.tensor([[65]]))


def test_what_cannot_be_is_refused() -> None:
    model = tiny_llama(tied=True)
    with pytest.raises(ConfigError, match="follow one another"):
        inject(model, LoRA(r=2, token_rows=(65, 66)))
    with pytest.raises(UnsupportedModule, match="embed_tokens: dense"):
        inject(model, LoRA(r=2, targets=("embed_tokens",), token_rows=(5,)))
    with pytest.raises(UnsupportedModule, match="lm_head: whole"):
        inject(model, LoRA(r=2, train_whole=("lm_head",), token_rows=(5,)))
    with pytest.raises(ConfigError, match="LoRA alone"):
        inject(model, BitFit(), new_tokens={"<a>": 64})
    with pytest.raises(ConfigError, match="token_rows"):
        LoRA(token_rows=(5, 5))
    assert registry_of(model) is None
    for name in ("a", "b"):
        inject(model, LoRA(r=2, token_rows=(64,)), name)
    with pytest.raises(MergeError, match="rows for tokens"):
        add_up(model, ["a", "b"])


def test_a_copied_model_trains_rows_of_its_own() -> None:
    model = injected("tied", (64,))
    twin = copy.deepcopy(model)
    randomise(require_registry(twin).adapter("a").parameters())
    deltas = require_registry(twin).adapter("a").deltas
    assert deltas["lm_head"].rows is deltas["model.embed_tokens"].rows
    assert not torch.equal(
        rows_of(model)["model.embed_tokens"], rows_of(twin)["model.embed_tokens"]
    )
