"""Dropout by a seed: what a mask is, and what it is a function of."""

from __future__ import annotations

import pytest
import torch

from sidepath.kernels.dropout import Mask


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_dropped_or_scaled(dtype: torch.dtype) -> None:
    x = torch.randn(64, 33).to(dtype)
    before = x.clone()
    y = Mask(0.25, 7).on(x)
    assert y.dtype == dtype
    assert torch.equal(x, before)
    dropped = y == 0
    torch.testing.assert_close(y[~dropped], (x / 0.75)[~dropped])
    assert torch.equal(Mask(0.25, 7).on(torch.ones_like(x)) == 0, dropped)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_the_share_that_is_dropped(share: float) -> None:
    """Of 250,000 numbers: within six standard deviations."""
    y = Mask(share, 3).on(torch.ones(500, 500))
    deviation = (share * (1 - share) / y.numel()) ** 0.5
    assert abs(float((y == 0).float().mean()) - share) < 6 * deviation
    assert abs(float(y.mean()) - 1) < 6 * deviation / (1 - share)


def test_a_mask_is_a_function_of_its_seed_and_not_of_the_state_of_torch() -> None:
    x = torch.ones(40, 40)
    one = Mask(0.5, 1).on(x)
    state = torch.get_rng_state()
    torch.rand(5)
    assert torch.equal(Mask(0.5, 1).on(x), one)
    assert not torch.equal(Mask(0.5, 2).on(x), one)
    torch.set_rng_state(state)
    Mask(0.5, 1).on(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_memory_layout_does_not_matter() -> None:
    x = torch.randn(30, 20)
    assert torch.equal(Mask(0.5, 1).on(x.T.contiguous().T), Mask(0.5, 1).on(x))


def test_drawn_masks_follow_from_the_state_and_move_it_on() -> None:
    torch.manual_seed(5)
    masks = [Mask.drawn(0.5) for _ in range(20)]
    assert len({mask.seed for mask in masks}) == 20
    torch.manual_seed(5)
    assert [Mask.drawn(0.5) for _ in range(20)] == masks
    torch.manual_seed(6)
    assert Mask.drawn(0.5) not in masks
    torch.manual_seed(5)
    torch.rand(())
    assert Mask.drawn(0.5) == masks[1], "each moves the state on by one number"


def test_zero_share_changes_nothing() -> None:
    x = torch.randn(3, 4)
    assert torch.equal(Mask(0.0, 1).on(x), x)
