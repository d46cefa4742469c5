"""Whole MLP blocks in one piece, against transformers' own modules and the plain form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, LlamaConfig, PhiConfig
from transformers.activations import ACT2FN
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi.modeling_phi import PhiMLP

from sidepath.core.blocks import ACTIVATIONS
from sidepath.core.quant import qualified
from sidepath.core.views import LinearView, view_of
from sidepath.kernels.activations import Activation
from sidepath.kernels.linear import Layer
from sidepath.kernels.mlp import gated_mlp, plain_mlp
from tests.kernels.saved import address, saved_storages

WIDE, INNER = 16, 40
GATED = ("gate_proj", "up_proj", "down_proj")
NAMES = {LlamaMLP: GATED, PhiMLP: ("fc1", "fc2"), GPT2MLP: ("c_fc", "c_proj")}
ACTS = ("silu", "gelu", "gelu_pytorch_tanh", "gelu_new")


def llama(act: str) -> Any:
    sizes = {"hidden_size": WIDE, "intermediate_size": INNER, "num_attention_heads": 2}
    return LlamaMLP(LlamaConfig(**sizes, hidden_act=act, mlp_bias=True))


def phi(act: str) -> Any:
    return PhiMLP(PhiConfig(hidden_size=WIDE, intermediate_size=INNER, hidden_act=act))


def gpt2(act: str) -> Any:
    config = GPT2Config(n_embd=WIDE, activation_function=act, resid_pdrop=0.0)
    return GPT2MLP(INNER, config)


def activation(name: str) -> Activation:
    return ACTIVATIONS[qualified(type(ACT2FN[name]))]


def layers_of(module: nn.Module, dtype: torch.dtype, ranks: Sequence[int]) -> list[Layer]:
    """The block's linear layers, each with a side path of some rank; rank 0: none."""
    found = []
    for name, rank in zip(NAMES[type(module)], ranks, strict=False):
        view = view_of(module.get_submodule(name).to(dtype).requires_grad_(False))
        assert isinstance(view, LinearView)
        rows, columns = view.shape
        A_RI: Tensor | None = None
        B_OR: Tensor | None = None
        if rank:
            A_RI = (torch.randn(rank, columns) / columns**0.5).to(dtype).requires_grad_()
            B_OR = (torch.randn(rows, rank) / rank).to(dtype).requires_grad_()
        layer = view.layer(A_RI, B_OR, 1.5)
        assert layer is not None
        found.append(layer)
    return found


def fused(x: Tensor, layers: Sequence[Layer], act: Activation) -> Tensor:
    if len(layers) == 3:
        gate, up, down = layers
        return gated_mlp(x, gate, up, down, act)
    up, down = layers
    return plain_mlp(x, up, down, act)


def merged(module: nn.Module, x: Tensor, layers: Sequence[Layer]) -> Tensor:
    """The module itself, its weights `W0 + s B A`, differentiable in `A` and `B`."""
    weights = {}
    for name, layer in zip(NAMES[type(module)], layers, strict=True):
        assert layer.W_OI is not None
        W_OI = layer.W_OI
        if layer.A_RI is not None and layer.B_OR is not None:
            W_OI = W_OI + layer.scaling * (layer.B_OR @ layer.A_RI)
        weights[f"{name}.weight"] = W_OI.T if isinstance(module, GPT2MLP) else W_OI
    result: Tensor = torch.func.functional_call(module, weights, (x,))
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("make", [llama, phi, gpt2])
def test_without_side_paths_the_output_has_the_modules_bits(
    make: Callable[[str], nn.Module], act: str, dtype: torch.dtype
) -> None:
    module = make(act).to(dtype)
    x = torch.randn(3, 5, WIDE).to(dtype).requires_grad_()
    expected = module(x)
    for rank in (0, 4):
        layers = layers_of(module, dtype, [rank] * 3)
        for layer in layers:
            if layer.B_OR is not None:
                layer.B_OR.data.zero_()
        assert torch.equal(fused(x, layers, activation(act)), expected)


@pytest.mark.parametrize("ranks", [(3, 2, 4), (0, 3, 0), (2, 0, 3), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("make", [llama, phi, gpt2])
def test_outputs_and_gradients_are_those_of_the_merged_module(
    make: Callable[[str], nn.Module], act: str, ranks: tuple[int, ...]
) -> None:
    module = make(act).double()
    layers = layers_of(module, torch.float64, ranks)
    x = torch.randn(2, 3, WIDE, dtype=torch.float64, requires_grad=True)
    wanted = [x, *(t for layer in layers for t in (layer.A_RI, layer.B_OR) if t is not None)]
    found, expected = fused(x, layers, activation(act)), merged(module, x, layers)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, wanted, weights), torch.autograd.grad(expected, wanted, weights)
    )


@pytest.mark.parametrize("make", [llama, phi])
@pytest.mark.parametrize("act", ACTS)
def test_gradcheck(act: str, make: Callable[[str], nn.Module]) -> None:
    layers = layers_of(make(act).double(), torch.float64, (2, 1, 2))
    own = [t for layer in layers for t in (layer.A_RI, layer.B_OR) if t is not None]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        rest = iter(values)
        placed = [layer._replace(A_RI=next(rest), B_OR=next(rest)) for layer in layers]
        return fused(x, placed, activation(act))

    x = torch.randn(2, WIDE, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *own), fast_mode=True)


@pytest.mark.parametrize("make", [llama, phi, gpt2])
def test_bfloat16_gradients_are_near_those_in_float32(make: Callable[[str], nn.Module]) -> None:
    """Of a chain of three rounded products: within 3 % of the largest number of each gradient."""
    module = make("silu").bfloat16()
    layers = layers_of(module, torch.bfloat16, (3, 2, 4))
    x = torch.randn(8, 6, WIDE).bfloat16().requires_grad_()
    wide = []
    for layer in layers:
        tensors: dict[str, Any] = {name: getattr(layer, name) for name in ("W_OI", "A_RI", "B_OR")}
        wide.append(layer._replace(**{name: one.float() for name, one in tensors.items()}))
    weights = torch.randn(8, 6, WIDE)
    narrow = [x, *(t for layer in layers for t in (layer.A_RI, layer.B_OR) if t is not None)]
    found = torch.autograd.grad(fused(x, layers, activation("silu")), narrow, weights.bfloat16())
    y = merged(module.float(), x.float(), wide)
    expected = torch.autograd.grad(y, narrow, weights)
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(
            gradient.float(), wanted.float(), rtol=0, atol=0.03 * float(wanted.abs().max())
        )


def test_only_the_input_and_what_the_activation_sees_are_kept() -> None:
    layers = layers_of(llama("silu"), torch.float32, (2, 3, 1))
    x = torch.randn(50, WIDE, requires_grad=True)
    with saved_storages() as kept:
        fused(x, layers, activation("silu"))
    own = {address(t) for layer in layers for t in layer[1:5] if t is not None}
    total = sum(size for at, size in kept.items() if at not in own)
    assert total == 4 * 50 * (WIDE + 2 * INNER + 2 + 3 + 1)


def test_nothing_is_changed_in_place_and_the_output_may_be() -> None:
    for make in (llama, phi):
        for ranks in ((2, 2, 2), (2, 0, 0)):
            layers = layers_of(make("gelu"), torch.float32, ranks)
            x = torch.randn(2, 5, WIDE, requires_grad=True)
            before = x.detach().clone()
            y = fused(x, layers, activation("gelu"))
            (expected,) = torch.autograd.grad(y.sum() * 2, x)
            fused(x, layers, activation("gelu")).mul_(2).sum().backward()
            assert torch.equal(x, before)
            torch.testing.assert_close(x.grad, expected)


def test_a_second_derivative_is_refused() -> None:
    layers = layers_of(llama("silu").double(), torch.float64, (2, 2, 2))
    x = torch.randn(3, WIDE, dtype=torch.float64, requires_grad=True)
    y = fused(x, layers, activation("silu")).square().sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ACTS)
def test_activations_and_their_derivatives(name: str, dtype: torch.dtype) -> None:
    act, module = activation(name), ACT2FN[name]
    x = torch.cat([torch.linspace(-30, 30, 401), torch.tensor([0.0, -0.0])]).to(dtype)
    x.requires_grad_()
    expected, d = module(x), torch.randn_like(x)
    assert torch.equal(act.forward(x.detach()), expected.detach())
    (wanted,) = torch.autograd.grad(expected, x, d)
    torch.testing.assert_close(act.back_(d.clone(), x.detach()), wanted)
