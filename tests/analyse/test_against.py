"""An update beside its weight: the numbers of Table 7 from their definitions."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidepath.analyse import Factors, against, decompose
from tests.analyse.kit import any_factors, dense_update, drawn


def weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def planted(scale: float) -> tuple[torch.Tensor, Factors]:
    """A weight whose spectrum falls as 10/n, the tenth at 1, and an update of one direction that
    is equally far from each of its own.
    """
    d = 40
    U, _ = torch.linalg.qr(weight(d, d, 1))
    V, _ = torch.linalg.qr(weight(d, d, 2))
    sigma = 10.0 / torch.arange(1, d + 1, dtype=torch.float64)
    u = U.sum(1) / math.sqrt(d)
    return (U * sigma) @ V.T, Factors(weight(1, d, 3) / math.sqrt(d), u[:, None] * scale, 1.0)


@given(any_factors(), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_projections_follow_their_definition(factors: Factors, seed: int) -> None:
    rows, columns = factors.shape
    W = weight(rows, columns, seed)
    dW = dense_update(factors)
    found = against(W, factors)
    U, sigma, V = torch.linalg.svd(dW, full_matrices=False)
    k = int((sigma > sigma[0] * 1e-12).sum())
    slow = float((U[:, :k].T @ W @ V[:k].T).norm())
    own = torch.linalg.svdvals(W)
    assert found.projected == pytest.approx(slow, rel=1e-6, abs=1e-9)
    assert found.projected_on_own == pytest.approx(float(own[:k].norm()))
    assert found.update_norm == pytest.approx(float(dW.norm()))
    assert found.weight_norm == pytest.approx(float(W.norm()))
    assert found.projected <= found.projected_on_own * (1 + 1e-9), "the most that any k can show"
    assert found.amplification == pytest.approx(float(dW.norm()) / slow, rel=1e-6)


def test_random_directions_show_what_the_closed_form_says() -> None:
    W, factors = weight(30, 50), drawn(30, 50, 4, seed=5)
    squares = [against(W, factors, seed=seed).projected_on_random ** 2 for seed in range(80)]
    expected = against(W, factors).expected_on_random ** 2
    assert expected == pytest.approx((4 * float(W.norm())) ** 2 / (30 * 50))
    error = statistics.stdev(squares) / math.sqrt(len(squares))
    assert abs(statistics.mean(squares) - expected) < 4 * error


def test_the_papers_random_column_is_the_closed_form() -> None:
    """Table 7: a square W of norm 61.95 and d = 12,288 gives 0.02 at r=4 and 0.33 at r=64."""
    assert pytest.approx(0.0202, abs=5e-5) == 4 * 61.95 / 12288
    W = weight(24, 24)
    found = against(W, drawn(24, 24, 4, seed=0))
    assert found.expected_on_random == pytest.approx(4 * float(W.norm()) / 24)


def test_an_update_along_the_weights_own_directions() -> None:
    W = torch.diag(torch.arange(20.0, 0.0, -1.0, dtype=torch.float64))
    top = Factors(torch.eye(2, 20), torch.eye(20, 2) * 3.0, 1.0)
    found = against(W, top)
    assert found.projected == pytest.approx(found.projected_on_own) == math.hypot(20, 19)
    assert found.in_top_inputs == pytest.approx(1.0)
    assert found.intruders == ()
    low = Factors(torch.eye(20)[18:], torch.eye(20)[:, 18:] * 3.0, 1.0)
    found = against(W, low)
    assert found.projected == pytest.approx(math.hypot(2, 1))
    assert found.amplification == pytest.approx(3 * math.sqrt(2) / math.hypot(2, 1))
    assert found.in_top_inputs == pytest.approx(0.0)


@pytest.mark.parametrize(("scale", "intruders"), [(0.1, 0), (0.5, 0), (5.0, 1), (20.0, 1)])
def test_a_planted_direction_intrudes_once_it_is_strong(scale: float, intruders: int) -> None:
    W, factors = planted(scale)
    assert len(against(W, factors).intruders) == intruders


def test_full_rank_noise_intrudes_nowhere() -> None:
    W, _ = planted(1.0)
    noise = Factors(weight(40, 40, 7) * 1e-3, torch.eye(40, dtype=torch.float64), 1.0)
    assert against(W, noise).intruders == ()


def test_a_zero_update_is_said_to_do_nothing() -> None:
    found = against(weight(6, 5), Factors(torch.randn(2, 5), torch.zeros(6, 2), 1.0))
    assert (found.projected, found.update_norm, found.amplification) == (0.0, 0.0, None)
    assert (found.intruders, found.in_top_inputs) == ((), 0.0)


def test_directions_that_an_update_lacks_do_not_count() -> None:
    A = torch.randn(3, 8, dtype=torch.float64)
    B = torch.zeros(9, 3, dtype=torch.float64)
    B[:, 0] = 1.0
    found = against(weight(9, 8), Factors(A, B, 1.0))
    alone = against(weight(9, 8), Factors(A[:1], B[:, :1], 1.0))
    assert found.projected == pytest.approx(alone.projected)
    assert len(decompose(Factors(A, B, 1.0)).sigma_K) == 3
