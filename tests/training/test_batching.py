from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from sidepath.data.dataset import load_data
from sidepath.training.batching import IGNORED, by_length, collate_packed, in_passes
from tests.training.kit import batch_of


@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 12), count=st.integers(1, 40))
def test_splitting_a_step_loses_nothing(size: int, count: int) -> None:
    rows = list(range(count))
    parts = list(in_passes(rows, size))
    assert [row for part in parts for row in part] == rows
    assert all(len(part) <= size for part in parts)
    lengths = [(7 * row) % 11 + 1 for row in rows]
    assert sorted(row for part in by_length(lengths, size) for row in part) == rows


def test_padding_is_masked_and_never_a_target(tokenizer: Any) -> None:
    rows = [{"prompt": "ab", "completion": "x"}, {"prompt": "a", "completion": "wxyz"}]
    data = load_data(rows, tokenizer)
    batch = batch_of(data, [0, 1])
    assert data.pad_id == tokenizer.eos_token_id
    assert batch.ids_BT.shape == (2, 7)
    for row, example in enumerate(data.examples):
        length = len(example.ids_T)
        assert batch.ids_BT[row, :length].tolist() == example.ids_T.tolist()
        assert batch.attention_mask_BT is not None
        assert batch.attention_mask_BT[row].tolist() == [1] * length + [0] * (7 - length)
        targets = [
            int(token) if wanted else IGNORED
            for token, wanted in zip(example.ids_T, example.supervised_T, strict=True)
        ]
        assert batch.targets_BT[row].tolist() == targets + [IGNORED] * (7 - length)
    assert (batch.tokens, batch.weight, batch.labels_B) == (12, 7, None)
    labelled = load_data([{"text": "a", "label": 0}, {"text": "b", "label": 1}], tokenizer)
    batch = batch_of(labelled, [1, 0])
    assert batch.labels_B is not None
    assert (batch.labels_B.tolist(), batch.weight) == ([1, 0], 2)


def test_packed_rows_stand_behind_one_another(tokenizer: Any) -> None:
    rows = [{"prompt": "ab", "completion": "x"}, {"prompt": "a", "completion": "wxyz"}]
    data = load_data([*rows, {"prompt": "cde", "completion": "vw"}], tokenizer)
    one, two, three = data.examples
    batch = collate_packed([[one, three], [two]], [0, 2, 1], data.pad_id)
    sizes = [len(example.ids_T) for example in data.examples]
    assert batch.ids_BT.tolist() == [
        [*one.ids_T, *three.ids_T],
        [*two.ids_T] + [data.pad_id] * (sizes[0] + sizes[2] - sizes[1]),
    ]
    assert batch.attention_mask_BT is None
    assert batch.positions_BT is not None
    assert batch.positions_BT[0].tolist() == [*range(sizes[0]), *range(sizes[2])]
    assert batch.positions_BT[1, : sizes[1]].tolist() == list(range(sizes[1]))
    assert not batch.positions_BT[1, sizes[1] :].any()
    alone = [batch_of(data, [row]) for row in range(3)]
    assert batch.weight == sum(one.weight for one in alone)
    assert batch.tokens == sum(sizes)
    assert batch.targets_BT[0, sizes[0]] == IGNORED, "nothing is predicted across a border"
