from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from sidepath.training.batching import IGNORED, by_length, collate, split_step, step_groups
from sidepath.training.data import load_data


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=90),
    size=st.integers(1, 12),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 3),
)
def test_every_row_once_an_epoch(lengths: list[int], size: int, seed: int, epoch: int) -> None:
    groups = step_groups(lengths, size, seed=seed, epoch=epoch)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert len(groups) == -(-len(lengths) // size)
    assert all(1 <= len(group) <= size for group in groups)
    assert groups == step_groups(lengths, size, seed=seed, epoch=epoch)


@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 12), count=st.integers(1, 40))
def test_splitting_a_step_loses_nothing(size: int, count: int) -> None:
    rows = list(range(count))
    parts = list(split_step(rows, size))
    assert [row for part in parts for row in part] == rows
    assert all(len(part) <= size for part in parts)
    lengths = [(7 * row) % 11 + 1 for row in rows]
    assert sorted(row for part in by_length(lengths, size) for row in part) == rows


def test_epochs_and_seeds_differ() -> None:
    lengths = list(range(1, 65))
    orders = [
        step_groups(lengths, 4, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)
    ]
    assert all(one != other for at, one in enumerate(orders) for other in orders[:at])


def test_rows_of_a_step_have_like_lengths() -> None:
    lengths = [(37 * row) % 101 + 1 for row in range(256)]

    def padding(groups: list[list[int]]) -> int:
        longest = [max(lengths[row] for row in group) * len(group) for group in groups]
        return sum(longest) - sum(lengths)

    unsorted = [list(range(start, start + 8)) for start in range(0, 256, 8)]
    assert padding(step_groups(lengths, 8, seed=0, epoch=0)) < 0.4 * padding(unsorted)


def test_padding_is_masked_and_never_a_target(tokenizer: Any) -> None:
    rows = [{"prompt": "ab", "completion": "x"}, {"prompt": "a", "completion": "wxyz"}]
    data = load_data(rows, tokenizer)
    batch = collate(data.examples, [0, 1], data.pad_id)
    assert data.pad_id == tokenizer.eos_token_id
    assert batch.ids_BT.shape == (2, 7)
    for row, example in enumerate(data.examples):
        length = len(example.ids_T)
        assert batch.ids_BT[row, :length].tolist() == example.ids_T.tolist()
        assert batch.attention_mask_BT[row].tolist() == [1] * length + [0] * (7 - length)
        targets = [
            int(token) if wanted else IGNORED
            for token, wanted in zip(example.ids_T, example.supervised_T, strict=True)
        ]
        assert batch.targets_BT[row].tolist() == targets + [IGNORED] * (7 - length)
    assert (batch.tokens, batch.weight, batch.labels_B) == (12, 7, None)
    labelled = load_data([{"text": "a", "label": 0}, {"text": "b", "label": 1}], tokenizer)
    batch = collate(labelled.examples, [1, 0], labelled.pad_id)
    assert batch.labels_B is not None
    assert (batch.labels_B.tolist(), batch.weight) == ([1, 0], 2)
