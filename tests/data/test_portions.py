from __future__ import annotations

from typing import Any

import pytest

from sidepath.data.dataset import load_data
from sidepath.data.portions import Portion, portion_of, regrouped, shares
from sidepath.errors import DataError

PARTS = (Portion("a", 0, 3, 0.25), Portion("b", 3, 4, 0.5, "row"), Portion("c", 4, 8, 0.25))


def test_a_single_source_is_one_portion(tokenizer: Any) -> None:
    data = load_data([{"text": "a"}, {"text": "b"}], tokenizer)
    assert data.parts == (Portion("the given rows", 0, 2, 1.0, "row"),)
    assert data.place(1) == "the given rows, row 2"


def test_each_row_is_in_one_portion() -> None:
    assert [portion_of(PARTS, row).name for row in range(8)] == list("aaabcccc")


def test_rows_stay_with_their_portion() -> None:
    single = (Portion("a", 0, 3, 1.0),)
    assert regrouped(single, [2, 0], weighted=False) == ([2, 0], (Portion("a", 0, 2, 1.0),))
    rows, parts = regrouped(PARTS, [7, 2, 4, 0, 5], weighted=True)
    assert rows == [2, 0, 7, 4, 5]
    assert parts == (Portion("a", 0, 2, 0.5), Portion("c", 2, 5, 0.5))
    _, parts = regrouped(PARTS, [7, 2, 4, 0, 5], weighted=False)
    assert [part.weight for part in parts] == [0.4, 0.6]


def test_shares_sum_to_one() -> None:
    assert shares(None, [30, 10]) == [0.75, 0.25]
    assert shares([7, 3], [1, 1]) == pytest.approx([0.7, 0.3])


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")]])
def test_impossible_weights(weights: list[float]) -> None:
    with pytest.raises(DataError, match="weights"):
        shares(weights, [5, 5])
