"""Dropout by a seed: the mask is drawn again where it is needed again, and never kept."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """Which numbers are dropped: a function of the seed, the shape, the dtype and the device."""

    share: float
    """Share of the numbers that become zero; the others grow by 1 / (1 - share)."""
    seed: int

    @classmethod
    def drawn(cls, share: float) -> Mask:
        """A mask whose seed follows from torch's random state, which moves on by one number.

        The seed is a digest of the state, not a number read from a tensor, so that a step can
        be taken on shapes alone (fake tensors) too.
        """
        state = torch.get_rng_state().numpy().tobytes()
        torch.rand(())
        return cls(share, int.from_bytes(hashlib.blake2b(state, digest_size=7).digest(), "big"))

    def on(self, x: Tensor) -> Tensor:
        """`x` with the mask's numbers dropped and the others scaled; a new tensor."""
        generator = torch.Generator(device=x.device).manual_seed(self.seed)
        mask = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        mask.bernoulli_(1.0 - self.share, generator=generator)
        return mask.mul_(x).div_(1.0 - self.share)
