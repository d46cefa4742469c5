"""A few numbers of each parameter of a base: where they lie, and how they are read (floor 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

from sidepath.core.quant import state_of
from sidepath.store.packed import Sampled, sampled_parameter
from sidepath.store.tensors import DTYPE_NAMES

SAMPLES = 16
DoneWith = Callable[[Tensor], None] | None
"""Told of each tensor when its numbers were taken."""


def positions(elements: int) -> list[int]:
    """Up to 16 positions spread over a flattened tensor: one in each 16th of it.

    Within its 16th a position is shifted by a fixed pseudo-random step, so that matrices whose
    width is a power of two are not sampled in one column only.
    """
    count = min(SAMPLES, elements)
    found = []
    for index in range(count):
        start, stop = index * elements // count, (index + 1) * elements // count
        found.append(start + ((index + 1) * 2654435761 % 2**32 * (stop - start) >> 32))
    return found


def sample_parameters(
    model: nn.Module, named: Iterable[tuple[str, Tensor]], done_with: DoneWith = None
) -> dict[str, Sampled]:
    """Samples of named parameters (a tied one once; those that hold no numbers left out).

    One small gather a tensor; the numbers leave their device in one copy a dtype.
    """
    seen: set[tuple[int, tuple[int, ...]]] = set()
    samples: dict[str, Sampled] = {}
    taken: dict[str, Tensor] = {}
    for name, tensor in named:
        if state_of(tensor) is not None:
            module = model.get_submodule(name.rpartition(".")[0])
            samples[name] = sampled_parameter(tensor, module, positions)
            continue
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.dtype not in DTYPE_NAMES or (tensor.numel() and key in seen):
            continue
        seen.add(key)
        index = _index(tensor.numel(), tensor.device)
        taken[name] = torch.take(tensor.detach(), index)
        if done_with is not None:
            done_with(tensor)
        samples[name] = (DTYPE_NAMES[tensor.dtype], key[1], b"")  # its place in the order
    return samples | _with_values(samples, taken)


@lru_cache(maxsize=1024)
def _index(elements: int, device: torch.device) -> Tensor:
    return torch.tensor(positions(elements), dtype=torch.long, device=device)


def _with_values(samples: Mapping[str, Sampled], taken: Mapping[str, Tensor]) -> dict[str, Sampled]:
    """The samples with the numbers that were taken, which come to the CPU in one piece a kind."""
    kinds: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    for name, values in taken.items():
        kinds.setdefault((values.dtype, values.device), []).append(name)
    found: dict[str, Sampled] = {}
    for (dtype, _), names in kinds.items():
        together = torch.cat([taken[name] for name in names]).cpu()
        raw, at = together.view(torch.uint8).numpy().tobytes(), 0
        for name in names:
            stop = at + taken[name].numel() * dtype.itemsize
            found[name] = (*samples[name][:2], raw[at:stop])
            at = stop
    return found
