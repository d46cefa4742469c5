"""Random numbers that follow from where a run stands, not from what was drawn before.

Dropout, and data that draw random numbers, use the global generators of Python, NumPy and
torch. Each step, and each row of such data, gets them seeded from the run's seed and its own
place (step and process; epoch and row). So there is no random state to save: a resumed run
draws what the unbroken one drew, with any number of worker processes, and what the caller
draws between steps changes nothing in the run.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def derived(*place: int, device: torch.device | None = None) -> Iterator[None]:
    """Within the block every global generator is seeded from `place`; the caller's state is
    back afterwards.

    `place` is any sequence of integers >= 0, such as (seed, step, process). `device` adds the
    generator of a GPU; without one the generators of all GPUs are left alone.
    """
    python, numpy = random.getstate(), np.random.get_state()
    cpu = torch.get_rng_state()
    gpu = None
    if device is not None and device.type == "cuda":
        gpu = (device, torch.cuda.get_rng_state(device))
    # Trailing zeros would not count without the length in front.
    words = np.random.SeedSequence([len(place), *place]).generate_state(4)
    try:
        random.seed(int(words[0]))
        np.random.seed(int(words[1]))
        torch.default_generator.manual_seed(int(words[2]) | int(words[3]) << 32)
        if gpu is not None:
            torch.cuda.manual_seed(int(words[2]) | int(words[3]) << 32)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu[1], gpu[0])
