"""Queries, keys and values computed together, whoever asks for them and when."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from tests.conftest import randomise
from tests.core.kit import (
    plainly,
    put,
    tiny,
)


def test_siblings_asked_on_another_input() -> None:
    model = put(tiny())
    attention = model.model.layers[0].self_attn
    for order in ("qkv", "kqv", "vkq", "qqk"):
        xs = [torch.randn(2, 4, 32, requires_grad=True) for _ in order]
        layers = [getattr(attention, f"{letter}_proj") for letter in order]
        found = [layer(x) for layer, x in zip(layers, xs, strict=True)]
        with plainly(model):
            expected = [layer(x) for layer, x in zip(layers, xs, strict=True)]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            torch.autograd.grad(sum(y.square().sum() for y in found), xs),
            torch.autograd.grad(sum(y.square().sum() for y in expected), xs),
            atol=1e-2,
            rtol=1e-4,
        )


def test_siblings_asked_twice_see_what_changed_in_between() -> None:
    model = put(tiny())
    attention, x = model.model.layers[0].self_attn, torch.randn(2, 4, 32)
    attention.q_proj(x)
    x.mul_(2)
    with plainly(model):
        expected = attention.k_proj(x)
    torch.testing.assert_close(attention.k_proj(x), expected)
    attention.q_proj(x)
    randomise(attention.v_proj.parameters(), 0.5)
    with plainly(model):
        expected = attention.v_proj(x)
    torch.testing.assert_close(attention.v_proj(x), expected)


@pytest.mark.parametrize("asked", ["q", "qk", "kv", "qkv"])
def test_siblings_that_are_never_asked_leak_nothing(asked: str) -> None:
    model = put(tiny())
    attention = model.model.layers[0].self_attn
    x = torch.randn(2, 4, 32, requires_grad=True)
    for letter in asked:
        getattr(attention, f"{letter}_proj")(x).sum().backward()
    dead = weakref.ref(x)
    del x
    gc.collect()
    assert dead() is None
