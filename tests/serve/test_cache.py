"""Rows of the cache: against keys and values kept in a dictionary, one list a row."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sidepath.serve.cache import RowsCache

HEADS, CONTEXT, WIDTH = 2, 12, 3


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_hold_what_was_written_for_their_owner(data: st.DataObject) -> None:
    cache = RowsCache(layers=2, rows=4, context=CONTEXT)
    kept: dict[int, Tensor] = {}
    new = 0
    for _ in range(data.draw(st.integers(1, 15))):
        can: list[Any] = ["claim"] * (len(kept) < 4) + ["release", "write", "write"] * bool(kept)
        match data.draw(st.sampled_from(can)):
            case "claim":
                cache.claim(new)
                kept[new] = torch.zeros(HEADS, 0, WIDTH)
                new += 1
            case "release":
                owner = data.draw(st.sampled_from(sorted(kept)))
                cache.release(owner)
                del kept[owner]
            case "write":
                tokens = data.draw(st.integers(1, 3))
                room = [o for o in sorted(kept) if kept[o].shape[1] + tokens <= CONTEXT]
                if room:
                    owners = data.draw(st.permutations(room))
                    owners = owners[: data.draw(st.integers(1, len(owners)))]
                    write(cache, kept, owners, tokens)
        check(cache, kept)
    assert cache.taken == len(kept)


def write(cache: RowsCache, kept: dict[int, Tensor], owners: list[int], tokens: int) -> None:
    starts = [kept[owner].shape[1] for owner in owners]
    positions = cache.select(owners, starts, tokens)
    assert positions.tolist() == [list(range(s, s + tokens)) for s in starts]
    assert cache.get_seq_length() == max(starts)
    assert cache.get_mask_sizes(tokens, 0) == (max(starts) + tokens, 0)
    states = torch.randn(len(owners), HEADS, tokens, WIDTH)
    for owner, state in zip(owners, states, strict=True):
        kept[owner] = torch.cat([kept[owner], state], dim=1)
    for layer in (0, 1):
        keys, values = cache.update(states + layer, -states, layer)
        assert keys.shape == values.shape == (len(owners), HEADS, max(starts) + tokens, WIDTH)
        for row, owner in enumerate(owners):
            length = kept[owner].shape[1]
            assert torch.equal(keys[row, :, :length], kept[owner] + layer)
            assert torch.equal(values[row, :, :length], -kept[owner])
            assert not keys[row, :, length:].any()


def check(cache: RowsCache, kept: dict[int, Tensor]) -> None:
    """Rows stand together at the front, and everything else is zero."""
    assert sorted(cache.row_of(owner) for owner in kept) == list(range(len(kept)))
    for layer in cache.layers:
        if not layer.is_initialized:
            continue
        assert not layer.keys[len(kept) :].any()
        for owner in kept:
            row, length = cache.row_of(owner), kept[owner].shape[1]
            assert torch.equal(layer.values[row, :, :length], -kept[owner])
            assert not layer.values[row, :, length:].any()


def test_rows_in_order_are_read_without_a_copy() -> None:
    cache = RowsCache(layers=1, rows=4, context=8)
    for owner in range(4):
        cache.claim(owner)
    cache.release(1)  # 3 stands where 1 was
    assert [cache.row_of(owner) for owner in (0, 3, 2)] == [0, 1, 2]
    states = torch.randn(2, 1, 1, 4)
    cache.select([0, 3], [0, 5], 1)
    keys, _ = cache.update(states, states, 0)
    assert keys.data_ptr() == cache.layers[0].keys.data_ptr()
    cache.select([3, 0], [6, 1], 1)
    keys, _ = cache.update(states, states, 0)
    assert keys.data_ptr() != cache.layers[0].keys.data_ptr()


def test_nothing_of_a_request_stays_behind_not_even_nan() -> None:
    cache = RowsCache(layers=1, rows=2, context=4)
    cache.claim(0)
    cache.claim(1)
    cache.select([0, 1], [0, 0], 3)
    states = torch.full((2, 1, 3, 2), float("nan"))
    states[1] = 1.0
    cache.update(states, states, 0)
    cache.release(0)
    layer = cache.layers[0]
    assert layer.keys[0, 0, :3].eq(1).all()
    assert not layer.keys[0, 0, 3:].any()
    assert not layer.keys[1].any()
