from __future__ import annotations

import numpy as np
import pytest
import torch

from sidepath.training.columns import Blank, Stored

COUNTS = np.array([3, 1, 5, 2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_vectors_of_tokens_come_back_to_the_bit(dtype: torch.dtype) -> None:
    first_BTD, second_BTD = torch.randn(2, 5, 7).to(dtype), torch.randn(2, 3, 7).to(dtype)
    column = Stored(first_BTD, COUNTS)
    column.put([2, 1], first_BTD)
    column.put([0, 3], second_BTD)
    found_BTD = column.of([3, 2], 6)
    assert found_BTD.dtype == dtype
    assert torch.equal(found_BTD[0, :2], second_BTD[1, :2])
    assert torch.equal(found_BTD[1, :5], first_BTD[0])
    assert not found_BTD[0, 2:].any()
    assert not found_BTD[1, 5:].any()
    assert column.bytes == 11 * 7 * dtype.itemsize


def test_vectors_of_rows() -> None:
    pooled_BD = torch.randn(4, 7)
    column = Stored(pooled_BD, np.ones(4, np.int64))
    column.put([3, 0, 2, 1], pooled_BD)
    assert torch.equal(column.of([0, 1, 2, 3], 9), pooled_BD[[1, 3, 2, 0]])


def test_what_nobody_reads_has_its_shape_and_takes_no_memory() -> None:
    column = Blank(torch.randn(2, 5, 7, dtype=torch.float64))
    column.put([0, 1], torch.randn(2, 5, 7))
    found_BTD = column.of([0, 1, 2], 4)
    assert found_BTD.shape == (3, 4, 7)
    assert found_BTD.dtype == torch.float64
    assert found_BTD.untyped_storage().nbytes() == 8
    assert Blank(torch.randn(2, 7)).of([0, 1, 2], 4).shape == (3, 7)


def test_a_full_disk_is_found_before_anything_is_mapped() -> None:
    with pytest.raises(OSError, match=r"\[Errno"):
        Stored(torch.randn(1, 1, 7), np.array([2**50]))
