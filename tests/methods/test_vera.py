"""VeRA against its formula in loops, its counts against the paper's, its draws frozen."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

from sidepath.core.views import DenseView, view_of
from sidepath.errors import ConfigError
from sidepath.injection.merging import merge, unmerge
from sidepath.injection.registry import registry_of
from sidepath.injection.surgery import route
from sidepath.methods.base import Site
from sidepath.methods.vera import Vectors, VeRA, uniform
from sidepath.store.adapter import inject, load
from sidepath.store.plan import plan
from sidepath.training.trained import trained_of
from tests.conftest import outputs, randomise, tiny_gpt2, tiny_llama
from tests.kinds import DTYPES, KINDS


def made(layer: nn.Module, **options: object) -> tuple[Vectors, DenseView]:
    view = view_of(layer)
    assert view is not None
    delta = VeRA(**options).dense_delta(Site("layer", "dense"), view)  # type: ignore[arg-type]
    assert isinstance(delta, Vectors)
    return delta, view


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_fresh_it_changes_no_bit_and_merged_it_is_the_same(kind: str, dtype: torch.dtype) -> None:
    layer, x = KINDS[kind].layer(12, 10).to(dtype), KINDS[kind].inputs(12)
    x = x.to(dtype) if x.is_floating_point() else x
    delta, view = made(layer, r=5)
    assert torch.equal(delta(x, view), layer(x))
    assert torch.equal(delta.folded(view)["weight"], layer.get_parameter("weight"))
    randomise(delta.parameters(), 0.3)
    folded = copy.deepcopy(layer)
    folded.weight.data = delta.folded(view)["weight"]
    close = {torch.bfloat16: 5e-2, torch.float16: 1e-2}.get(dtype, 1e-5)
    torch.testing.assert_close(delta(x, view), folded(x), atol=close, rtol=close)
    assert not torch.allclose(folded(x), layer(x), atol=1e-3)


def test_values_and_gradients_are_those_of_the_formula() -> None:
    """Equation (2): `W0 x + Λb B Λd A x`, with A and B of Kaiming-uniform size."""
    layer = nn.Linear(7, 5).double()
    delta, view = made(layer, r=3, dtype="base", projection_seed=4)
    randomise(delta.parameters(), 0.5)
    x = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    A = uniform(4, 0, 7, 3).T * (6 / 7) ** 0.5
    B = uniform(4, 1, 5, 3) * (6 / 3) ** 0.5
    d, b = (getattr(delta, name).detach().clone().requires_grad_() for name in ("d", "b"))
    y = F.linear(x, layer.weight.detach() + torch.diag(b) @ B @ torch.diag(d) @ A, layer.bias)
    torch.testing.assert_close(delta(x, view), y)
    weights = torch.randn(6, 5, dtype=torch.float64)
    expected = torch.autograd.grad((y * weights).sum(), [d, b, x])
    found = torch.autograd.grad((delta(x, view) * weights).sum(), [delta.d, delta.b, x])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)

    def of(d: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = functional_call(delta, {"d": d, "b": b}, (x.detach(), view))
        return found

    assert torch.autograd.gradcheck(of, (d, b))


def test_the_draws_are_frozen() -> None:
    """A saved adapter depends on these numbers: they must never change."""
    expected = [
        [0.5131875161902903, -0.37891018546667277],
        [0.22014728851760146, 0.8795570628760818],
    ]
    found = uniform(3, 0, 2, 2)
    assert found.tolist() == expected
    assert torch.equal(uniform(3, 0, 5, 2)[:2], found), "more rows begin with the same ones"
    assert not torch.equal(uniform(3, 1, 2, 2), found)
    assert not torch.equal(uniform(4, 0, 2, 2), found)
    many = uniform(0, 0, 400, 100)
    assert many.abs().max() <= 1
    torch.testing.assert_close(many.square().mean().item(), 1 / 3, atol=0.01, rtol=0)


def test_all_layers_share_one_pair_of_factors() -> None:
    model = tiny_llama()
    adapter = inject(model, VeRA(r=6), "a")
    deltas = [delta for delta in adapter.deltas.values() if isinstance(delta, Vectors)]
    assert len(deltas) == 14
    assert len({delta.A.untyped_storage().data_ptr() for delta in deltas}) == 1
    assert len({delta.B.untyped_storage().data_ptr() for delta in deltas}) == 1
    for delta in deltas:
        assert delta.A.shape == (6, delta.shape[2])
        assert torch.equal(delta.A[:, :32], deltas[0].A)
    one, _ = made(nn.Linear(32, 16), r=6)
    assert torch.equal(one.A, deltas[0].A), "a layer's part does not depend on the others"


def test_only_the_vectors_are_saved_and_the_seed_gives_the_rest(tmp_path: Path) -> None:
    model, ids = tiny_llama(), torch.randint(3, 64, (2, 7))
    adapter = inject(model, VeRA(r=6, projection_seed=11), "a")
    randomise(adapter.parameters(), 0.5)
    expected = outputs(model, ids)
    assert {name.rpartition(".")[2] for name in trained_of(model, "a").tensors} == {"d", "b"}
    folder = adapter.save(tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in tensors} == {"d", "b"}
    again = tiny_llama()
    state = torch.get_rng_state()
    load(again, folder, "b")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(outputs(again, ids), expected)
    other = tiny_llama()
    found = inject(other, VeRA(r=6, projection_seed=12), "a")
    for one, mine in zip(found.deltas.values(), adapter.deltas.values(), strict=True):
        one.take_(mine.tensors())
    assert not torch.allclose(outputs(other, ids), expected, atol=1e-3), "another seed, another"


def test_it_routes_merges_and_adapts_parts() -> None:
    model, ids = tiny_gpt2(), torch.randint(3, 64, (2, 7))
    base = outputs(model, ids)
    adapter = inject(model, VeRA(r=4, targets=("c_attn:q,v", "wte", "c_fc")), "a")
    assert torch.equal(outputs(model, ids), base)
    randomise(adapter.parameters(), 0.5)
    apart = outputs(model, ids)
    fused = adapter.deltas["transformer.h.0.attn.c_attn"]
    assert isinstance(fused, Vectors)
    assert (fused.d.shape, fused.b.shape) == ((8,), (64,))
    folded = fused.merged(torch.zeros(96, 32))
    assert not folded[32:64].any()
    assert folded[:32].any()
    with route(model, [None, "a"]):
        routed = outputs(model, ids)
    assert torch.equal(routed[0], base[0])
    torch.testing.assert_close(routed[1], apart[1])


def test_merged_on_a_model() -> None:
    model, ids = tiny_llama(), torch.randint(3, 64, (2, 7))
    adapter = inject(model, VeRA(r=4), "a")
    randomise(adapter.parameters(), 0.5)
    apart = outputs(model, ids)
    merge(model, "a")
    torch.testing.assert_close(outputs(model, ids), apart, atol=1e-5, rtol=1e-5)
    unmerge(model)
    assert torch.equal(outputs(model, ids), apart)


@pytest.mark.parametrize(
    ("width", "inner", "blocks", "millions"), [(4096, 11008, 32, 1.6), (5120, 13824, 40, 2.4)]
)
def test_the_papers_counts(width: int, inner: int, blocks: int, millions: float) -> None:
    """The paper's table 5: LLaMA-7B 1.6M and 13B 2.4M trained parameters, r 1024, all linear."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        one_block = LlamaForCausalLM(
            LlamaConfig(hidden_size=width, intermediate_size=inner, num_hidden_layers=1,
                        num_attention_heads=32, vocab_size=32)
        )  # fmt: skip
    trained = plan(one_block, VeRA(r=1024), batch_size=1, tokens=4).trainable * blocks
    assert round(trained / 1e6, 1) == millions


@pytest.mark.parametrize(
    "options",
    [
        {"r": 0},
        {"projection_seed": -1},
        {"d_start": 0.0},
        {"dropout": 1.0},
        {"targets": ()},
        {"layers": ()},
    ],
)
def test_impossible_settings(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        VeRA(**options)  # type: ignore[arg-type]


def test_a_model_without_it_is_what_it_was() -> None:
    from sidepath.injection.surgery import remove

    model = tiny_llama()
    keys = list(model.state_dict())
    inject(model, VeRA(r=4), "a")
    remove(model, "a")
    assert registry_of(model) is None
    assert list(model.state_dict()) == keys
