"""DoRA against the paper's formula written out, and the identities of its sections 4.1 to 4.3."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidepath.analyse.factors import factors_of
from sidepath.core.views import DenseView
from sidepath.errors import ConfigError, StoreError, UnsupportedModule
from sidepath.injection.merging import merge, unmerge
from sidepath.injection.registry import registry_of
from sidepath.injection.surgery import route
from sidepath.methods.dora import Dora
from sidepath.methods.lora import LoRA
from sidepath.store.adapter import inject
from sidepath.store.plan import plan
from tests.conftest import outputs, randomise, tiny_gpt2, tiny_llama
from tests.kinds import DTYPES, KINDS
from tests.methods.kit import TOLERANCE, delta_beside

LINEAR = ("linear", "linear without bias", "conv1d of transformers")


def made(layer: nn.Module, **options: object) -> tuple[Dora, DenseView]:
    delta, view = delta_beside(layer, LoRA(dora=True, **options))  # type: ignore[arg-type]
    assert isinstance(delta, Dora)
    return delta, view


def reference(W0_OI: Tensor, A: Tensor, B: Tensor, m_O: Tensor, scaling: float) -> Tensor:
    """The paper's equation (5) with our scaling: `m (W0 + s B A) / ‖W0 + s B A‖`."""
    rows = []
    for row, row_B, m in zip(W0_OI, B, m_O, strict=True):
        V = row + scaling * sum(b * a for b, a in zip(row_B, A, strict=True))
        rows.append(m * V / V.square().sum().sqrt())
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LINEAR)
def test_a_fresh_delta_changes_no_bit(kind: str, dtype: torch.dtype) -> None:
    layer, x = KINDS[kind].layer(12, 10).to(dtype), KINDS[kind].inputs(12).to(dtype)
    delta, view = made(layer, r=4, dtype="base")
    assert torch.equal(delta(x, view), layer(x))
    assert torch.equal(delta.folded(view)["weight"], layer.get_parameter("weight"))
    norms = view.matrix().double().norm(dim=1)
    torch.testing.assert_close(delta.magnitude.double(), norms, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LINEAR)
def test_it_is_the_papers_formula_beside_and_merged(kind: str, dtype: torch.dtype) -> None:
    layer, x = KINDS[kind].layer(12, 10).to(dtype), KINDS[kind].inputs(12).to(dtype)
    delta, view = made(layer, r=3, alpha=6.0, dtype="base" if dtype == torch.float64 else "float32")
    randomise(delta.parameters(), 0.3)
    A, B, m = (delta.A.double(), delta.B.double(), delta.magnitude.double())
    W = reference(view.matrix().double(), A, B, m, delta.scaling).detach()
    torch.testing.assert_close(W.norm(dim=1), m.abs().detach())
    bias = None if view.bias is None else view.bias.double()
    expected = F.linear(x.double(), W, bias).to(dtype)
    close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(delta(x, view), expected, **close)
    folded = copy.deepcopy(layer)
    folded.weight.data = delta.folded(view)["weight"]
    assert folded.weight.dtype == dtype
    torch.testing.assert_close(folded(x), expected, **close)
    if dtype == torch.float64:
        merged = delta.merged(view.matrix())
        torch.testing.assert_close(merged, W)
        torch.testing.assert_close(merged.norm(dim=1), m.abs().detach())


def test_gradients_hold_the_norm_constant() -> None:
    """Section 4.3: the gradient is that of `g (W0 + s B A) x` with g's denominator a constant."""
    layer = nn.Linear(7, 5).double()
    delta, view = made(layer, r=2, dtype="base")
    randomise(delta.parameters(), 0.3)
    x = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(6, 5, dtype=torch.float64)
    names = ("A", "B", "magnitude")
    own = [getattr(delta, name) for name in names]
    found = torch.autograd.grad((delta(x, view) * weights).sum(), [*own, x])

    W0 = layer.weight.detach()
    A, B, m = (tensor.detach().clone().requires_grad_() for tensor in own)
    V = W0 + delta.scaling * (B @ A)
    norm = V.detach().norm(dim=1)
    y = F.linear(x, (m / norm)[:, None] * V, layer.bias)
    expected = torch.autograd.grad((y * weights).sum(), [A, B, m, x])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    V = W0 + delta.scaling * (B @ A)
    whole = F.linear(x, (m / V.norm(dim=1))[:, None] * V, layer.bias)
    through = torch.autograd.grad((whole * weights).sum(), [A])[0]
    assert not torch.allclose(found[0], through), "the norm is not differentiated"


def test_a_row_of_zeros_has_no_direction_and_no_nan() -> None:
    layer = nn.Linear(6, 4)
    with torch.no_grad():
        layer.weight[1] = 0
    delta, view = made(layer, r=2)
    x = torch.randn(3, 6)
    assert torch.equal(delta(x, view), layer(x))
    delta(x, view).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in delta.parameters() if p.grad is not None)
    randomise(iter([delta.B]))
    assert torch.isfinite(delta(x, view)).all()
    assert torch.isfinite(delta.merged(layer.weight)).all()


def test_dropout_spares_the_base() -> None:
    layer = nn.Linear(30, 4)
    delta, view = made(layer, r=2, dropout=0.9)
    delta.train()
    x = torch.randn(3, 30)
    assert torch.equal(delta(x, view), layer(x))
    randomise(iter([delta.B]), 1.0)
    assert not torch.equal(delta(x, view), delta(x, view))


def test_on_a_model_it_trains_merges_routes_and_counts() -> None:
    model, ids = tiny_llama(), torch.randint(3, 64, (2, 7))
    lora = plan(model, LoRA(r=2)).trainable
    config = LoRA(r=2, dora=True)
    rows = sum(m.out_features for p, m in model.named_modules()
               if isinstance(m, nn.Linear) and p != "lm_head")  # fmt: skip
    assert plan(model, config).trainable == lora + rows, "one number a row beyond LoRA"
    base = outputs(model, ids)
    adapter = inject(model, config, "a")
    assert torch.equal(outputs(model, ids), base)
    randomise(adapter.parameters())
    apart = outputs(model, ids)
    with route(model, ["a", None]):
        routed = outputs(model, ids)
    torch.testing.assert_close(routed[0], apart[0])
    assert torch.equal(routed[1], base[1])
    merge(model, "a")
    torch.testing.assert_close(outputs(model, ids), apart, atol=1e-5, rtol=1e-4)
    unmerge(model)
    assert torch.equal(outputs(model, ids), apart)


def test_what_it_cannot_take_is_named_all_at_once() -> None:
    model = tiny_gpt2()
    with pytest.raises(UnsupportedModule) as caught:
        inject(model, LoRA(dora=True, targets=("wte", "wpe", "c_attn:q,v", "c_fc")), "a")
    faults = "\n".join(caught.value.faults)
    assert len(caught.value.faults) == 4
    assert "transformer.wte: " in faults
    assert "embedding" in faults
    assert "transformer.h.1.attn.c_attn: " in faults
    assert registry_of(model) is None


@pytest.mark.parametrize("start", ["loftq", "pissa", "olora"])
def test_starts_that_move_the_matrix_are_not_for_it(start: str) -> None:
    with pytest.raises(ConfigError, match="dora"):
        LoRA(dora=True, start=start)  # type: ignore[arg-type]


def test_its_update_is_not_inspected_as_if_it_were_thin(tmp_path: Path) -> None:
    adapter = inject(tiny_llama(), LoRA(r=2, dora=True, targets=("q_proj",)), "a")
    with pytest.raises(StoreError, match="no product of thin factors"):
        factors_of(adapter.save(tmp_path / "a"))


def test_beside_a_quantised_layer() -> None:
    """QDoRA: the norms are those of the matrix that the 4-bit codes stand for."""
    pytest.importorskip("bitsandbytes")
    from sidepath.injection.quantising import quantise_

    model, ids = tiny_llama(), torch.randint(3, 64, (2, 7))
    quantise_(model, dtype=torch.float32)
    base = outputs(model, ids)
    adapter = inject(model, LoRA(r=2, dora=True, targets=("q_proj", "up_proj")), "a")
    assert torch.equal(outputs(model, ids), base)
    randomise(adapter.parameters())
    apart = outputs(model, ids)
    assert not torch.allclose(apart, base, atol=1e-3)
    merge(model, "a")
    torch.testing.assert_close(outputs(model, ids), apart, atol=1e-4, rtol=1e-3)
