"""Random numbers by their position: against the mixer written out, and what files rely on."""

from __future__ import annotations

import pytest
import torch

from sidepath.kernels.hashed import bits, normal, permutation, seed_of, signs

SEED = seed_of("a", 1)


def lowbias32(x: int) -> int:
    """The mixer on Python's own integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D % (1 << 32)
    x ^= x >> 15
    x = x * 0x846CA68B % (1 << 32)
    return x ^ x >> 16


def bit_by_bit(seed: int, place: int) -> int:
    high, low = divmod(place, 1 << 31)
    value = lowbias32(lowbias32(low ^ seed & 0xFFFFFFFF) ^ (seed >> 32) + high & 0xFFFFFFFF)
    return value - (1 << 32) if value >> 31 else value


@pytest.mark.parametrize("start", [0, 5, (1 << 31) - 3, (1 << 33) + 7])
@pytest.mark.parametrize("seed", [0, SEED, (1 << 64) - 1])
def test_the_stream_is_the_mixer_s(seed: int, start: int) -> None:
    expected = [bit_by_bit(seed, place) for place in range(start, start + 8)]
    assert bits(seed, start, 8).tolist() == expected


def test_a_piece_of_a_stream_is_that_piece() -> None:
    whole = normal(SEED, 0, 4096)
    assert torch.equal(torch.cat([normal(SEED, 0, 1024), normal(SEED, 1024, 3072)]), whole)


def test_normal_numbers_are_normal() -> None:
    g = normal(SEED, 0, 1 << 20).double()
    assert g.isfinite().all()
    # Standard errors of the first four moments of 2^20 such numbers, five times.
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(g.pow(power).mean() - moment) < 5 * (spread / len(g)) ** 0.5
    pairs = g.view(-1, 2)
    assert abs((pairs[:, 0] * pairs[:, 1]).mean()) < 5 * len(pairs) ** -0.5
    beyond = (g.abs() > 3).double().mean()
    assert beyond == pytest.approx(0.0027, rel=0.1)


def test_signs_and_permutations() -> None:
    sign = signs(SEED, 1 << 16)
    assert set(sign.tolist()) == {-1.0, 1.0}
    assert abs(sign.mean()) < 5 * 2**-8
    order = permutation(SEED, 1000)
    assert sorted(order.tolist()) == list(range(1000))
    assert not torch.equal(order, permutation(seed_of("a", 2), 1000))


def test_seeds_follow_from_every_word() -> None:
    assert len({seed_of("a", 1), seed_of("a", 2), seed_of("b", 1), seed_of("a1")}) == 4


def test_torch_s_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    normal(SEED, 0, 16), permutation(SEED, 16), signs(SEED, 16)
    assert torch.equal(torch.get_rng_state(), state)
