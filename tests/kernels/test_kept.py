"""What is kept of a layer's input: a norm's input in the place of its output, while that holds."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sidepath.core.views import LinearView, view_of
from sidepath.kernels.kept import keep, note
from sidepath.kernels.linear import Layer, SidePathLinears
from sidepath.kernels.norm import rms_norm

WIDE = 12


def normed() -> tuple[Tensor, Tensor]:
    x = torch.randn(5, WIDE, requires_grad=True)
    return x, rms_norm(x, torch.randn(WIDE), 1e-6)


def side_path() -> Layer:
    view = view_of(nn.Linear(WIDE, 7).requires_grad_(False))
    assert isinstance(view, LinearView)
    layer = view.layer(
        torch.randn(2, WIDE, requires_grad=True), torch.randn(7, 2, requires_grad=True), 2.0
    )
    assert layer is not None
    return layer


def test_what_has_no_note_is_kept_itself() -> None:
    x = torch.randn(3, 4)
    tensors, again = keep(x)
    assert tensors == (x,)
    assert again(tensors) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norms_output_is_made_again_to_the_bit(dtype: torch.dtype) -> None:
    x = torch.randn(4, 5, WIDE).to(dtype).requires_grad_()
    y = rms_norm(x, torch.randn(WIDE).to(dtype), 1e-6)
    tensors, again = keep(y)
    assert tensors[0] is x
    assert all(tensor is not y for tensor in tensors)
    made = again(tensors)
    assert torch.equal(made, y)
    assert not made.requires_grad


@pytest.mark.parametrize(
    "write",
    [lambda y: y.mul_(2), lambda y: y[0].zero_(), lambda y: y.view(-1)[:3].add_(1)],
    ids=["whole", "a row", "through a view"],
)
def test_a_note_on_what_was_written_into_is_not_read(write: Callable[[Tensor], Tensor]) -> None:
    _, y = normed()
    write(y)
    tensors, again = keep(y)
    assert tensors == (y,)
    assert again(tensors) is y


def test_what_is_made_of_a_norms_output_has_no_note() -> None:
    _, y = normed()
    for other in (y * 1, y.view(-1), y.detach(), y.clone(), y[:2], copy.copy(y.detach())):
        tensors, _ = keep(other)
        assert tensors[0] is other


@pytest.mark.parametrize("write", [False, True])
def test_a_layer_behind_a_norm_has_the_gradients_of_the_plain_form(write: bool) -> None:
    """Written into in between or not: the factors' gradients see what the layer saw."""
    layer = side_path()
    assert layer.A_RI is not None
    assert layer.B_OR is not None
    x, gain_D = torch.randn(5, WIDE, requires_grad=True), torch.randn(WIDE)
    y, d = rms_norm(x, gain_D, 1e-6), torch.randn(5, 7)
    wide = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain_D
    if write:
        y.mul_(3).add_(1)
        wide = wide * 3 + 1
    (out,) = SidePathLinears.apply(y, (layer,), None, layer.A_RI, layer.B_OR)  # type: ignore[no-untyped-call]
    wanted = [x, layer.A_RI, layer.B_OR]
    found = torch.autograd.grad(out, wanted, d)
    assert layer.W_OI is not None
    weight = layer.W_OI.double() + 2.0 * layer.B_OR.double() @ layer.A_RI.double()
    expected = torch.autograd.grad(torch.nn.functional.linear(wide, weight), wanted, d.double())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_output_itself_is_not_kept() -> None:
    """Of norm and layer together the norm's input lives on, and the norm's output dies."""
    layer = side_path()
    _, y = normed()
    (out,) = SidePathLinears.apply(y, (layer,), None, layer.A_RI, layer.B_OR)  # type: ignore[no-untyped-call]
    dead = weakref.ref(y)
    del y
    gc.collect()
    assert dead() is None
    out.sum().backward()


def test_changing_the_norms_input_after_it_is_refused_by_torch() -> None:
    layer = side_path()
    leaf = torch.randn(5, WIDE, requires_grad=True)
    x = leaf * 1
    y = rms_norm(x, torch.randn(WIDE), 1e-6)
    (out,) = SidePathLinears.apply(y, (layer,), None, layer.A_RI, layer.B_OR)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_note_is_what_its_maker_says() -> None:
    y = torch.randn(3)
    note(y, (y / 2,), lambda tensors: tensors[0] * 2)
    tensors, again = keep(y)
    torch.testing.assert_close(again(tensors), y)
