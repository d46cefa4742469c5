"""loralib's weights, against its forward formulas written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sidepath.errors import DamagedAdapter, StoreError
from sidepath.injection.registry import registry_of
from sidepath.store.loralib_format import load_loralib

ALPHA, R = 6.0, 2


def linear_reference(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Linear: the base's product, and beside it x through A, then B, times alpha / r."""
    return F.linear(x, W, b) + (x @ A.T @ B.T) * (ALPHA / A.shape[0])


def merged_linear_reference(
    x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, enabled: tuple[bool, ...]
) -> Tensor:
    """MergedLinear: the output is len(enabled) equal parts; the i-th enabled one gets B_i A_i x."""
    rows = W.shape[0] // len(enabled)
    r = B.shape[1]
    y = F.linear(x, W, b).clone()
    used = 0
    for part, on in enumerate(enabled):
        if on:
            A_i, B_i = A[used * r : (used + 1) * r], B[used * rows : (used + 1) * rows]
            y[..., part * rows : (part + 1) * rows] += (x @ A_i.T @ B_i.T) * (ALPHA / r)
            used += 1
    return y


def test_linear_with_bias() -> None:
    model: Any = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    A, B, b = torch.randn(R, 5), torch.randn(4, R), torch.randn(4)
    x = torch.randn(7, 5)
    W = model[0].weight.detach()
    hidden = linear_reference(x, W, b, A, B).tanh()
    expected = F.linear(hidden, model[2].weight, model[2].bias)
    load_loralib(model, {"0.lora_A": A, "0.lora_B": B, "0.bias": b}, alpha=ALPHA)
    assert torch.allclose(model(x), expected, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("enabled", [(True, False, True), (False, True, False), (True, True, True)])
def test_fused(enabled: tuple[bool, ...], transposed: bool) -> None:
    layer: Any = Conv1D(12, 5) if transposed else nn.Linear(5, 12)
    nn.init.normal_(layer.bias)
    model = nn.ModuleDict({"c_attn": layer})
    n = sum(enabled)
    A, B = torch.randn(n * R, 5), torch.randn(4 * n, R)
    x = torch.randn(7, 5)
    W = layer.weight.detach().T if transposed else layer.weight.detach()
    expected = merged_linear_reference(x, W, layer.bias.detach(), A, B, enabled)
    state = {"c_attn.lora_A": A, "c_attn.lora_B": B}
    load_loralib(model, state, alpha=ALPHA, fused={"c_attn": enabled})
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_fused_without_saying_so_is_refused() -> None:
    model = nn.ModuleDict({"c_attn": nn.Linear(5, 12)})
    state = {"c_attn.lora_A": torch.ones(4, 5), "c_attn.lora_B": torch.ones(8, 2)}
    with pytest.raises(DamagedAdapter, match="say which parts are adapted if it is fused"):
        load_loralib(model, state, alpha=ALPHA)
    for enabled in ((False, False, False), (True,) * 5, (True, False)):
        with pytest.raises(DamagedAdapter):
            load_loralib(model, state, alpha=ALPHA, fused={"c_attn": enabled})
    assert registry_of(model) is None


def test_embedding() -> None:
    model = nn.Sequential(nn.Embedding(9, 4))
    A, B = torch.randn(R, 9), torch.randn(4, R)
    ids = torch.tensor([[0, 3, 8]])
    expected = model(ids) + F.embedding(ids, A.T) @ B.T * (ALPHA / R)
    load_loralib(model, {"0.lora_A": A, "0.lora_B": B}, alpha=ALPHA)
    assert torch.allclose(model(ids), expected, atol=1e-5)


@pytest.mark.parametrize(("kernel", "groups"), [(1, 1), (3, 1), (2, 1), (2, 2), (3, 3)])
def test_conv2d(kernel: int, groups: int) -> None:
    """The product of the factors is read, number by number, as the kernel."""
    layer = nn.Conv2d(6, 12, kernel, padding=1, groups=groups)
    model = nn.Sequential(layer)
    A, B = torch.randn(R * kernel, 6 * kernel), torch.randn(12 // groups * kernel, R * kernel)
    x = torch.randn(2, 6, 5, 5)
    W = layer.weight.detach() + (B @ A).reshape(layer.weight.shape) * (ALPHA / R)
    expected = F.conv2d(x, W, layer.bias, padding=1, groups=groups)
    load_loralib(model, {"0.lora_A": A, "0.lora_B": B}, alpha=ALPHA)
    assert torch.allclose(model(x), expected, atol=1e-4)


def test_several_ranks_and_a_bias_elsewhere() -> None:
    model: Any = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    factors = [(torch.randn(2, 5), torch.randn(4, 2)), (torch.randn(3, 4), torch.randn(3, 3))]
    bias = torch.randn(3)
    x = torch.randn(7, 5)
    hidden = x
    for layer, (A, B) in zip(model, factors, strict=False):
        hidden = linear_reference(hidden, layer.weight.detach(), layer.bias.detach(), A, B)
    expected = F.layer_norm(hidden, (3,), model[2].weight, bias)
    state = {
        f"{i}.lora_{n}": t for i, ab in enumerate(factors) for n, t in zip("AB", ab, strict=True)
    }
    adapter = load_loralib(model, state | {"2.bias": bias}, alpha=ALPHA, name="old")
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert adapter.name == "old"


def test_a_safetensors_file_loads_and_saves_in_our_format(tmp_path: Path) -> None:
    from sidepath.store.adapter import load

    torch.manual_seed(1)
    model, again = (nn.Sequential(nn.Linear(5, 12)) for _ in range(2))
    again.load_state_dict(model.state_dict())
    save_file(
        {"0.lora_A": torch.randn(4, 5), "0.lora_B": torch.randn(8, 2)}, tmp_path / "l.safetensors"
    )
    fused = {"0": (True, False, True)}
    adapter = load_loralib(model, tmp_path / "l.safetensors", alpha=ALPHA, fused=fused)
    adapter.save(tmp_path / "a")
    load(again, tmp_path / "a")
    x = torch.randn(2, 5)
    assert torch.equal(model(x), again(x))


@pytest.mark.parametrize("name", ["old.pt", "old.bin", "old.ckpt"])
def test_a_pickle_is_refused_with_the_line_that_converts_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(StoreError, match=r"(?s)never loaded.*save_file\(torch\.load"):
        load_loralib(nn.Sequential(nn.Linear(2, 2)), tmp_path / name, alpha=1)


def test_all_faults_come_at_once_and_nothing_is_put_in() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3, bias=False))
    state = {
        "0.lora_A": torch.full((2, 5), float("nan")),
        "0.lora_B": torch.ones(4, 2),
        "1.lora_A": torch.ones(2, 4, dtype=torch.long),
        "1.weight": torch.ones(3, 4),
        "2.lora_A": torch.ones(2, 2),
        "3.lora_A": torch.ones(2, 3),
        "3.lora_B": torch.ones(3, 2),
        "3.bias": torch.ones(3),
        "9.lora_A": torch.ones(2, 2),
    }
    with pytest.raises(DamagedAdapter) as caught:
        load_loralib(model, state, alpha=1)
    named = sorted({fault[0] for fault in caught.value.faults})
    assert named == ["0", "1", "2", "3", "9"]
    assert registry_of(model) is None
    with pytest.raises(DamagedAdapter, match="no lora_A"):
        load_loralib(model, {}, alpha=1)
