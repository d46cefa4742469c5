from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidepath.errors import RoutingError
from sidepath.kernels.tiles import tiles_of

CPU = torch.device("cpu")


@settings(max_examples=60, deadline=None)
@given(
    slots=st.lists(st.integers(-1, 3), max_size=80),
    ranks=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    block=st.sampled_from([None, 16, 32]),
)
def test_every_token_of_an_adapter_is_in_one_tile_of_its_own(
    slots: list[int], ranks: list[int], block: int | None
) -> None:
    starts = tuple(sum(ranks[:k]) for k in range(5))
    scalings = (0.5, 1.0, 2.0, -3.0)
    tiles = tiles_of(torch.tensor(slots, dtype=torch.int64), starts, scalings, CPU, block=block)
    assert sorted(tiles.order_N.tolist()) == list(range(len(slots)))
    seen: list[int] = []
    for (first, count, row, rank), scaling in zip(
        tiles.tiles_T4.tolist(), tiles.scalings_T.tolist(), strict=True
    ):
        assert 1 <= count <= tiles.block
        assert 1 <= rank <= tiles.rank
        tokens = tiles.order_N[first : first + count].tolist()
        (slot,) = {slots[token] for token in tokens}
        assert (row, row + rank, scaling) == (starts[slot], starts[slot + 1], scalings[slot])
        seen += tokens
    wanted = [token for token, slot in enumerate(slots) if slot >= 0 and ranks[slot]]
    assert sorted(seen) == wanted, "the base's and those of no rank are in none"


def test_tiles_grow_with_the_groups() -> None:
    few, many = torch.arange(8), torch.zeros(500, dtype=torch.int64)
    starts, scalings = tuple(range(9)), (1.0,) * 8
    assert tiles_of(few, starts, scalings, CPU).block == 16
    assert tiles_of(many, starts, scalings, CPU).block == 64
    assert len(tiles_of(many, starts, scalings, CPU).tiles_T4) == 8


def test_all_faults_at_once() -> None:
    slots = torch.tensor([0, 5, -2, -1])
    with pytest.raises(RoutingError) as caught:
        tiles_of(slots, (0, 4, 2), (1.0,), CPU)
    text = str(caught.value)
    for part in ("3 starts for 1 scalings", "ascend", "slot 5", "slot -2"):
        assert part in text
    with pytest.raises(RoutingError, match="one a token"):
        tiles_of(slots.view(2, 2), (0, 4), (1.0,), CPU)
