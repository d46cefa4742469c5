"""GPT-3 175B from first principles: what the LoRA paper claims of it, with no weight allocated."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from sidepath import LoRA
from sidepath.methods.plain import FullFineTuning
from sidepath.store.plan import Plan, plan
from tests.store.bases import base

WIDTH, LAYERS, WORDS, CONTEXT = 12288, 96, 50257, 2048
N = WORDS * WIDTH + CONTEXT * WIDTH + LAYERS * (12 * WIDTH**2 + 13 * WIDTH) + 2 * WIDTH
"""Words, positions, per block 12 d² of matrices and 13 d of biases and norms, the last norm."""


@cache
def planned(r: int | None, dtype: str = "float16") -> Plan:
    """LoRA on queries and values, or everything; the base in half precision."""
    half = base("gpt3-175b").to(torch.float16)
    config: Any = FullFineTuning() if r is None else LoRA(
        r=r, targets=("c_attn:q,v",), dtype=dtype)  # type: ignore[arg-type]  # fmt: skip
    return plan(half, config, batch_size=1, tokens=CONTEXT, activations=False)


def test_it_has_175_billion_parameters_and_350_gigabytes() -> None:
    assert planned(4).total == N == 174_604_259_328
    assert planned(4).memory.weights - 2 * planned(4).trainable == pytest.approx(2 * N, rel=1e-4)
    assert round(2 * N / 10**9) == 349, "the paper says 350 GB"


@pytest.mark.parametrize(("r", "millions"), [(1, "4.7"), (8, "37.7")])
def test_the_two_loras_of_table_4(r: int, millions: str) -> None:
    count = planned(r).trainable
    assert count == 2 * LAYERS * 2 * WIDTH * r, "two matrices a layer, two factors each"
    assert f"{count / 10**6:.1f}" == millions


def test_a_checkpoint_of_rank_4_is_36_mebibytes_beside_350_gigabytes() -> None:
    """Section 4.2: 350 GB to 35 MB, roughly 10,000 times: 36.0 MiB in half precision, 9,250."""
    assert 2 * planned(4).trainable == 36 * 2**20
    assert pytest.approx(9_250, rel=1e-3) == 2 * N / (36 * 2**20)
    apart = base("gpt3-175b, q and v apart").to(torch.float16)
    config = LoRA(r=4, targets=("q_proj", "v_proj"), dtype="float16")
    size = plan(apart, config, activations=False).adapter_bytes
    assert 36 * 2**20 < size < 1.01 * 36 * 2**20, "the header is what is more"


def test_beside_a_fused_projection_the_file_holds_the_zeros_of_other_tools_layout() -> None:
    """Q and v of one matrix (3 d, d): A is (2 r, d), and B a block-diagonal (3 d, 2 r)."""
    numbers = LAYERS * (2 * 4 * WIDTH + 3 * WIDTH * 2 * 4)
    assert 2 * numbers < planned(4).adapter_bytes < 2.02 * numbers


def test_training_takes_a_third_of_the_memory() -> None:
    """Section 4.2: from 1.2 TB to 350 GB, "up to 2/3" less. Counted are the model's states: the
    weights, the gradients, and Adam's two moments, all in the weights' precision (16 bits: 8 bytes
    a parameter; 1.4 TB, of which 2 N for the weights alone are left). With gradients left out, as
    when each is used at once and freed, it is 1.05 TB and exactly three times; the paper's 1.2 TB
    lies between. Activations are left out of both.
    """
    full, lora = planned(None).memory, planned(4).memory
    # `plan` has the base and the copy that is trained; training in place would hold one.
    in_place = full.gradients + full.optimizer + (full.weights - full.gradients)
    assert in_place == pytest.approx(8 * N, rel=1e-3)
    states = lora.weights + lora.gradients + lora.optimizer
    assert states == pytest.approx(2 * N, rel=2e-3)
    without_gradients = in_place - full.gradients
    assert without_gradients / states == pytest.approx(3, rel=2e-3)
    assert without_gradients < 1.2e12 < in_place
    assert in_place / states == pytest.approx(4, rel=2e-3)


def test_training_it_costs_two_thirds_of_the_arithmetic() -> None:
    """`2 N² + 6 N R` for `3 N²`: forward and the gradient of activations, and no other."""
    found = planned(4).flops
    matrices = LAYERS * 12 * WIDTH**2 + WORDS * WIDTH
    assert found.matrices == 2 * matrices
    assert found.beside == 2 * planned(4).trainable
    assert found.attention == 4 * CONTEXT * LAYERS * WIDTH
    assert found.training_full == 3 * (found.matrices + found.attention)
    assert planned(None).flops.training == found.training_full
    assert found.serving_merged == found.matrices + found.attention
    assert found.serving == found.serving_merged + found.beside
    # Attention has no weights: its share stays at three forward passes.
    expected = 2 * found.matrices + 3 * (found.attention + found.beside)
    first = 2 * WIDTH * 3 * WIDTH  # nothing is trained in front of the first projection
    assert found.training == expected - first
