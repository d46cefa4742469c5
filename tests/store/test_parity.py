"""The measure that decides whether a merged model is published."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sidepath.errors import DataError, StoreError
from sidepath.store.parity import calibration_rows, compare, disturbed


def test_parity_is_what_it_says() -> None:
    want = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    got = torch.tensor([[2.0, 0.0, 0.5], [0.0, 1.0, 1.5]])
    found = compare([want], [got], [want - 3], [torch.full((2, 3), -0.1)])
    p, q = want.softmax(-1), got.softmax(-1)
    assert found.max_abs == 1.5
    assert found.mean_abs == pytest.approx(2.0 / 6)
    assert found.top1 == 0.5
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    assert found.effect == 3.0
    assert found.tolerance == pytest.approx(0.4, rel=1e-3)
    assert not found.holds
    assert compare([want], [want], [want], [want * 0]).holds
    assert not compare([want], [want * float("nan")], [want], [want + 9]).holds


def test_one_bad_position_cannot_hide_a_wrong_mean() -> None:
    want = torch.zeros(100, 4)
    noisy = want.clone()
    noisy[0] = 1.0  # one position where the model is very sensitive
    assert not compare([want], [want + 0.5], [want], [noisy]).holds
    assert compare([want], [noisy], [want], [noisy]).holds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_noise_is_that_of_one_rounding(dtype: torch.dtype) -> None:
    exact = torch.rand(200_000, dtype=torch.float64) + 1.0
    rounding = ((exact.to(dtype).double() - exact) / exact).std()
    before = exact.float()
    noise = ((disturbed("w", before, dtype) - before) / before).double().std()
    assert 1.0 <= noise / rounding <= 2.0
    assert torch.equal(disturbed("w", before, dtype), disturbed("w", before, dtype))
    assert not torch.equal(disturbed("w", before, dtype), disturbed("v", before, dtype))


def test_no_more_positions_than_the_outputs_have_room_for(stories: Path) -> None:
    texts = ["Once upon a time there was a little girl. " * 4] * 100
    rows = calibration_rows(stories, 512, texts)
    assert sum(map(len, rows)) == 2048
    assert max(map(len, rows)) <= 96
    assert sum(map(len, calibration_rows(stories, 2**28 // 20 // 50, texts))) == 50


def test_calibration_without_a_tokenizer_is_the_same_each_time(tmp_path: Path) -> None:
    rows = calibration_rows(tmp_path, 64)
    assert rows == calibration_rows(tmp_path, 64)
    assert all(0 <= token < 64 for row in rows for token in row)
    assert len({tuple(row) for row in rows}) == len(rows)


def test_texts_need_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="need a tokenizer"):
        calibration_rows(tmp_path, 64, ["some text"])


def test_texts_are_encoded_by_the_bases_tokenizer(stories: Path) -> None:
    assert len(calibration_rows(stories, 512)) == 6
    (row,) = calibration_rows(stories, 512, ["Once upon a time"])
    assert row
    for size, texts in ((1, ["Once"]), (512, [])):
        with pytest.raises(DataError, match="no tokens"):
            calibration_rows(stories, size, texts)


def test_a_tokenizer_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(StoreError, match="tokenizer cannot be loaded"):
        calibration_rows(tmp_path, 64)
