"""The way to Triton's kernels, from a routed model and a 4-bit layer; on a GPU or interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sidepath
from sidepath import LoRA
from sidepath.core.quant import packed_linear
from sidepath.injection.registry import registry_of
from sidepath.kernels import on_gpu
from sidepath.kernels.checked import TRIALS, Verdict
from tests.conftest import randomise, tiny_llama
from tests.kernels.interpreter import device, on_triton


def _asked_anyway(tensor: Any) -> bool:
    """`may_run` where the interpreter stands in for a GPU."""
    return not torch.is_grad_enabled()


@on_triton
def test_a_routed_model_uses_the_kernels_once_they_agreed() -> None:
    model = tiny_llama().to(device()).eval()
    for name, rank in (("a", 4), ("b", 3)):
        sidepath.inject(model, LoRA(r=rank), name=name)
        randomise(registry_of(model).adapter(name).parameters())  # type: ignore[union-attr]
    ids_BT = torch.randint(0, 64, (4, 5), device=device())
    names = ["b", None, "a", "b"]
    with torch.no_grad(), sidepath.route(model, names):
        expected = model(input_ids=ids_BT).logits
    allowed, on_gpu.may_run = on_gpu.may_run, _asked_anyway
    try:
        with torch.no_grad(), sidepath.route(model, names):
            first, then = (model(input_ids=ids_BT).logits for _ in range(2))
    finally:
        on_gpu.may_run = allowed
    routed = [key for key in TRIALS.verdicts if key.kernel == "routed"]
    assert routed
    assert all(TRIALS.verdicts[key] is Verdict.FAST for key in routed)
    assert "routed" not in TRIALS.barred
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(then, expected)
    assert torch.equal(then[1], expected[1]), "a row of the base is the base's"


@on_triton
def test_a_packed_layer_uses_the_kernel_once_it_agreed() -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = packed_linear(torch.nn.Linear(128, 64, bias=False).to(device()), dtype=torch.float32)
    model = torch.nn.Sequential(layer)
    sidepath.inject(model, LoRA(r=2, targets=("0",)))
    x = torch.randn(2, 3, 128, device=device())
    asked: list[str] = []
    original, allowed = on_gpu.packed_product, on_gpu.may_run

    def watched(*args: Any, **named: Any) -> Any:
        asked.append("packed")
        return original(*args, **named | {"trials": _Untimed()})

    on_gpu.packed_product, on_gpu.may_run = watched, _asked_anyway  # type: ignore[assignment]
    try:
        with torch.no_grad():
            found = [model(x) for _ in range(2)]
    finally:
        on_gpu.packed_product, on_gpu.may_run = original, allowed
    assert asked == ["packed", "packed"]
    with torch.no_grad():
        expected = model(x)
    for each in found:
        torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-5)


class _Untimed(type(TRIALS)):  # type: ignore[misc]
    """Trials that find the kernel faster: no GPU tells the time here."""

    def __init__(self) -> None:
        super().__init__(timer=lambda run: 0.0)
