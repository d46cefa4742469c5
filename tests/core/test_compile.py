"""`torch.compile` of an injected model: one graph, and the results of eager mode.

The routed forward has its own test in `test_routed.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sidepath.injection.surgery import activate, put_in
from sidepath.injection.targets import resolve
from sidepath.methods.lora import LoRA
from tests.conftest import randomise, tiny_gpt2, tiny_llama

IDS = torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _forgetful() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def adapted(make: Callable[..., Any]) -> Any:
    model, config = make(), LoRA(r=2)
    if make is tiny_llama:
        del model.model.layers[1:]
    installed = put_in(model, config, "x", resolve(model, config))
    randomise(installed.parameters())
    activate(model, "x")
    return model


def compiled(model: nn.Module) -> Callable[..., tuple[Tensor, ...]]:
    """`fullgraph`: a break in the graph is an error."""
    found: Callable[..., tuple[Tensor, ...]] = torch.compile(
        model, fullgraph=True, backend="aot_eager"
    )
    return found


def logits(run: Callable[..., tuple[Tensor, ...]]) -> Tensor:
    return run(IDS, use_cache=False, return_dict=False)[0]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_inference(make: Callable[..., nn.Module]) -> None:
    model = adapted(make).eval()
    with torch.no_grad():
        run = compiled(model)
        torch.testing.assert_close(logits(run), logits(model))
        activate(model, None)
        torch.testing.assert_close(logits(run), logits(model))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_training(make: Callable[..., nn.Module]) -> None:
    """Loss and gradients; GPT-2's own dropout is off, as the two draw in another order."""
    model = adapted(make).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    found = {}
    for name, run in (("eager", model), ("compiled", compiled(model))):
        model.zero_grad()
        logits(run).square().mean().backward()
        found[name] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(found["eager"]) > 8
    assert found["eager"].keys() == found["compiled"].keys()
    for name, gradient in found["compiled"].items():
        torch.testing.assert_close(gradient, found["eager"][name], atol=1e-5, rtol=1e-3)
