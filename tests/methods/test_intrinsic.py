"""Training in a random subspace: against the matrix written out, its counts, and its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sidepath import IntrinsicDimension, merge, plan, remove, unmerge
from sidepath.core.views import View
from sidepath.errors import ConfigError
from sidepath.injection.registry import registry_of, require_registry
from sidepath.injection.targets import resolve
from sidepath.kernels.hadamard import Fastfood
from sidepath.kernels.hashed import seed_of
from sidepath.methods.intrinsic import layer_of
from sidepath.store.adapter import Adapter, inject, load
from tests.conftest import MODELS, randomise, tiny_bert, tiny_llama

KINDS = ("did", "said")
NAMES = ("llama", "gpt2", "bert")


def output_of(model: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = model(x).logits
    return result


def matrix_of(projection: Fastfood) -> Tensor:
    """P, column by column."""
    unit = torch.eye(projection.d, dtype=torch.float64)
    return torch.stack([projection.apply(column) for column in unit], dim=1)


def moved_by_matrices(
    model: nn.Module, config: IntrinsicDimension, theta: Tensor, scales: Tensor | None
) -> dict[str, Tensor]:
    """`θ_D0 + λ P θ_d` for every parameter of a plain model, by name, from explicit matrices."""
    named = dict(model.named_parameters())
    total = sum(parameter.numel() for parameter in named.values())
    layers = list(dict.fromkeys(layer_of(name.rpartition(".")[0]) for name in named))
    moved = {}
    for name, held in named.items():
        seed = seed_of("intrinsic", config.seed, name)
        P = matrix_of(Fastfood(seed, len(theta), held.numel(), total)).to(theta.dtype)
        layer = layers.index(layer_of(name.rpartition(".")[0]))
        factor = 1.0 if scales is None else scales[layer]
        moved[name] = held.detach() + factor * (P @ theta).view(held.shape)
    return moved


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_output_and_gradients_are_those_of_the_explicit_matrix(kind: Any, tied: bool) -> None:
    model, plain = tiny_llama(tied=tied).double(), tiny_llama(tied=tied).double()
    config = IntrinsicDimension(d=20, kind=kind, seed=3)
    parameters = list(inject(model, config, "a").parameters())
    randomise(iter(parameters))
    ours = [parameter.detach().clone().requires_grad_(True) for parameter in parameters]
    ids = torch.randint(3, 64, (2, 6))
    found = output_of(model, ids)
    found.square().sum().backward()
    moved = moved_by_matrices(plain, config, ours[0], ours[1] if kind == "said" else None)
    expected = torch.func.functional_call(plain, moved, (ids,)).logits
    expected.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    for parameter, reference in zip(parameters, ours, strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_exactly_d_numbers_are_trained(name: str, kind: Any, tmp_path: Path) -> None:
    model = MODELS[name][0]()
    config = IntrinsicDimension(d=37, kind=kind)
    assert plan(MODELS[name][0](), config).trainable == 37
    adapter = inject(model, config, "a")
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 37
    saved = load_file(adapter.save(tmp_path / "a") / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == 37
    assert {key.rpartition(".")[2] for key in saved} == {"theta", "scales"} - (
        {"scales"} if kind == "did" else set()
    )


def test_207_numbers_take_less_than_a_kilobyte() -> None:
    """Aghajanyan et al., 2020: MRPC in RoBERTa-large takes 207 numbers with SAID, 828 bytes."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    more = {"intermediate_size": 4096, "vocab_size": 50265, "max_position_embeddings": 514}
    with torch.device("meta"):
        model = RobertaForSequenceClassification(RobertaConfig(**sizes, **more, type_vocab_size=1))
    config = IntrinsicDimension(d=207)
    sites = resolve(model, config)
    deltas = config.deltas(
        sites, {site.path: View(model.get_submodule(site.path)) for site in sites}
    )
    trained = [parameter for delta in deltas.values() for parameter in delta.parameters()]
    assert sum(parameter.numel() for parameter in model.parameters()) > 355_000_000
    assert sum(parameter.numel() * parameter.element_size() for parameter in trained) == 828


def test_a_head_trained_whole_comes_on_top() -> None:
    model = tiny_bert()
    adapter = inject(model, IntrinsicDimension(d=20, train_whole=("classifier",)), "a")
    assert sum(p.numel() for p in adapter.parameters()) == 20 + 2 * 32 + 2


def test_scales_of_one_make_said_the_same_as_did() -> None:
    """With as many numbers left for the vector; the scales start at 1."""
    ids = torch.randint(3, 64, (2, 6))
    outputs = []
    for config in (IntrinsicDimension(d=24, kind="said"), IntrinsicDimension(d=20, kind="did")):
        model = tiny_llama()
        theta = next(inject(model, config, "a").parameters())
        assert theta.shape == (20,)  # four layers: the embeddings and norm, two blocks, the head
        with torch.no_grad():
            theta.copy_(torch.arange(20) - 9.5)
        outputs.append(output_of(model, ids))
    assert torch.equal(*outputs)


def test_a_loaded_adapter_answers_alike_and_another_seed_does_not(tmp_path: Path) -> None:
    ids = torch.randint(3, 64, (2, 6))
    model, other = tiny_llama(), tiny_llama()
    adapter = inject(model, IntrinsicDimension(d=20, seed=5), "a")
    randomise(adapter.parameters(), 1.0)
    folder = adapter.save(tmp_path / "a")
    again = tiny_llama()
    state = torch.get_rng_state()
    load(again, folder, "b")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(output_of(again, ids), output_of(model, ids))
    twin = inject(other, IntrinsicDimension(d=20, seed=6), "a")
    for parameter, held in zip(twin.parameters(), adapter.parameters(), strict=True):
        parameter.data.copy_(held.data)
    assert not torch.allclose(output_of(other, ids), output_of(model, ids), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_merged_it_answers_alike_and_unmerged_the_base_is_back(
    name: str, dtype: torch.dtype
) -> None:
    make, x_of = MODELS[name]
    model, x = make().to(dtype), x_of()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    randomise(inject(model, IntrinsicDimension(d=20), "a").parameters(), 2.0)
    with torch.no_grad():
        expected = output_of(model, x)
        for _ in range(2):
            merge(model, "a")
            assert torch.equal(output_of(model, x), expected)
            unmerge(model)
        assert torch.equal(output_of(model, x), expected)
    remove(model, "a")
    found = model.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in state.items())


def test_what_is_kept_without_gradients_follows_every_change() -> None:
    model, ids = tiny_llama(), torch.randint(3, 64, (2, 6))
    adapter = inject(model, IntrinsicDimension(d=20), "a")
    deltas: Any = list(require_registry(model).adapter("a").deltas.values())
    for _ in range(2):
        randomise(adapter.parameters())
        fresh = output_of(model, ids).detach()
        assert all(delta.kept is None for delta in deltas), "nothing is held while training"
        with torch.no_grad():
            assert torch.equal(output_of(model, ids), fresh)
            kept = [delta.kept[1] for delta in deltas]
            assert torch.equal(output_of(model, ids), fresh)
        assert all(delta.kept[1] is one for delta, one in zip(deltas, kept, strict=True))


@pytest.mark.parametrize("d", [3, 10**6])
def test_an_impossible_number_of_dimensions_is_refused(d: int) -> None:
    model = tiny_llama()
    with pytest.raises(ConfigError, match=r"more than 4, .* at most"):
        inject(model, IntrinsicDimension(d=d), "a")
    assert registry_of(model) is None


@pytest.mark.parametrize("more", [{"d": 0}, {"seed": -1}, {"kind": "dad"}])
def test_bad_settings(more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        IntrinsicDimension(**more)


def test_two_adapters_share_one_base_and_not_their_numbers() -> None:
    model = tiny_llama()
    one = inject(model, IntrinsicDimension(d=20), "one")
    two = inject(model, IntrinsicDimension(d=30), "two")
    assert isinstance(one, Adapter)
    assert not {id(p) for p in one.parameters()} & {id(p) for p in two.parameters()}


def test_the_layers_of_a_model() -> None:
    assert layer_of("encoder.layer.3.output.dense") == "encoder.layer.3"
    assert layer_of("bert.embeddings.LayerNorm") == "bert.embeddings"
    assert layer_of("lm_head") == ""
