"""Ragged masks against the definition of each kind, token by token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sidepath.errors import UnsupportedModule
from sidepath.serve.masks import kinds_of, ragged_masks

WINDOW, CHUNK = 3, 4


def sees(kind: str, query: int, key: int) -> bool:
    if kind == "sliding_attention":
        return query - WINDOW < key <= query
    if kind == "chunked_attention":
        return key <= query and key // CHUNK == query // CHUNK
    return key <= query


def config(**fields: Any) -> Any:
    defaults = {"_attn_implementation": "sdpa", "layer_types": None}
    return SimpleNamespace(**defaults | fields)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 4))
def test_each_row_sees_what_its_kind_of_layer_lets_it(starts: list[int], tokens: int) -> None:
    kinds = ["full_attention", "sliding_attention", "chunked_attention"]
    found = kinds_of(
        config(layer_types=kinds * 2, sliding_window=WINDOW, attention_chunk_size=CHUNK)
    )
    positions = torch.tensor(starts)[:, None] + torch.arange(tokens)
    longest = max(starts) + tokens
    masks = ragged_masks(found, positions, longest)
    added = ragged_masks(found, positions, longest, torch.float32)
    assert isinstance(masks, dict)
    assert isinstance(added, dict)
    assert set(masks) == set(kinds)
    for kind in kinds:
        expected = [
            [[[sees(kind, s + t, key) for key in range(longest)] for t in range(tokens)]]
            for s in starts
        ]
        assert masks[kind].tolist() == expected
        lowest = torch.finfo(torch.float32).min
        assert torch.equal(added[kind], torch.where(masks[kind], 0.0, lowest))


def test_a_base_of_one_kind_takes_one_mask() -> None:
    positions = torch.tensor([[4], [6]])
    for fields, kind in (
        ({}, "full_attention"),
        ({"sliding_window": WINDOW}, "sliding_attention"),
        ({"attention_chunk_size": CHUNK}, "chunked_attention"),
    ):
        mask = ragged_masks(kinds_of(config(**fields)), positions, 7)
        assert isinstance(mask, torch.Tensor)
        assert mask[:, 0, 0].tolist() == [[sees(kind, q, k) for k in range(7)] for q in (4, 6)]


def test_what_has_no_mask_is_refused() -> None:
    with pytest.raises(UnsupportedModule, match="linear_attention"):
        kinds_of(config(layer_types=["full_attention", "linear_attention"]))
    with pytest.raises(UnsupportedModule, match='attn_implementation="sdpa"'):
        kinds_of(config(_attn_implementation="flash_attention_2"))
