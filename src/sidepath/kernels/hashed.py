"""Random numbers by position: a hash of a counter, alike on every device and in every release.

What a saved file refers to by a seed alone must mean the same wherever it is read; the streams of
torch's generators differ between devices and may change between releases.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_MIX = (0x7FEB352D, 0x846CA68B - (1 << 32))
"""Multipliers of the 32-bit mixer `lowbias32` (Wellons, 2018), the second as an int32."""


def seed_of(*words: object) -> int:
    """A seed of 64 bits that follows from these words and no others."""
    text = "\0".join(map(str, words)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def bits(seed: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Numbers `start ... start + count - 1` of the stream of `seed`: int32, every bit random.

    Positions are mixed in two words of 32 bits, so that streams are as long as tensors may be.
    """
    high, low = divmod(start, 1 << 31)
    if low + count > 1 << 31:
        first = (1 << 31) - low
        rest = bits(seed, start + first, count - first, device)
        return torch.cat([bits(seed, start, first, device), rest])
    x = torch.arange(low, low + count, dtype=torch.int32, device=device)
    x = _mixed(x.bitwise_xor_(_int32(seed)))
    return _mixed(x.bitwise_xor_(_int32((seed >> 32) + high)))


def signs(seed: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """`count` numbers +1 or -1, float32."""
    return (bits(seed, 0, count, device) < 0).to(torch.float32).mul_(-2.0).add_(1.0)


def permutation(seed: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """A permutation of `0 ... count - 1`, int64."""
    return torch.argsort(bits(seed, 0, count, device), stable=True)


def normal(seed: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """`count` numbers of N(0, 1), float32, from position `start`; both are even.

    Box and Muller (1958): `sqrt(-2 ln u) (cos 2πv, sin 2πv)`, the pair in places 2i and 2i + 1.
    `u` has 32 bits and is never 0; devices agree up to the rounding of logarithm and sine.
    """
    pairs = bits(seed, start, count, device).to(torch.float32).view(-1, 2)
    # int32 / 2^32 lies in [-1/2, 1/2]: as an angle the same circle, for u shifted into (0, 1].
    radius = pairs[:, 0].mul(2.0**-32).add_(0.5 + 2.0**-25).clamp_(2.0**-26, 1.0)
    radius = radius.log_().mul_(-2.0).sqrt_()
    angle = pairs[:, 1].mul(2.0 * math.pi * 2.0**-32)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1).view(-1)


def _mixed(x: Tensor) -> Tensor:
    """`lowbias32` of each number, in place: a bijection of 32 bits that leaves no pattern."""
    for shift, factor in ((16, _MIX[0]), (15, _MIX[1])):
        x.bitwise_xor_(_shifted(x, shift)).mul_(factor)
    return x.bitwise_xor_(_shifted(x, 16))


def _shifted(x: Tensor, places: int) -> Tensor:
    """int32 shifted right with zeros coming in, which torch's own shift does not do."""
    return (x >> places).bitwise_and_((1 << (32 - places)) - 1)


def _int32(word: int) -> int:
    """The lowest 32 bits as a signed number."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word
