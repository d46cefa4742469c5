"""The run's own random state, apart from the caller's.

Dropout draws from the global generators. The loop swaps its own state in for a step and the
caller's back before it yields: what the caller draws between steps changes nothing in the
run, and the run changes nothing for the caller.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class RandomState:
    """States of Python's, NumPy's and torch's global generators."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    torch_cpu: Tensor
    torch_device: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """The generators' present state; `device`'s too when it has a generator of its own."""
        return cls(
            random.getstate(),
            np.random.get_state(legacy=False),  # type: ignore[arg-type]
            torch.get_rng_state(),
            torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        )

    @classmethod
    def seeded(cls, seed: int, device: torch.device) -> RandomState:
        """The state after seeding every generator; the global state stays as it was."""
        caller = cls.now(device)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        state = cls.now(device)
        caller.put(device)
        return state

    def put(self, device: torch.device) -> None:
        """Make this the generators' state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch_cpu)
        if self.torch_device is not None:
            torch.cuda.set_rng_state(self.torch_device, device)

    @contextlib.contextmanager
    def in_force(self, device: torch.device) -> Iterator[None]:
        """Use and advance this state inside the block; the caller's is back afterwards."""
        caller = RandomState.now(device)
        self.put(device)
        try:
            yield
        finally:
            self.__dict__.update(RandomState.now(device).__dict__)
            caller.put(device)

    def as_dict(self) -> dict[str, Any]:
        """Plain values that JSON holds."""
        key = self.numpy["state"]["key"].tolist()
        device = None if self.torch_device is None else bytes(self.torch_device.tolist()).hex()
        return {
            "python": [self.python[0], list(self.python[1]), self.python[2]],
            "numpy": {**self.numpy, "state": {**self.numpy["state"], "key": key}},
            "torch_cpu": bytes(self.torch_cpu.tolist()).hex(),
            "torch_device": device,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RandomState:
        """The inverse of `as_dict`. Errors: KeyError, TypeError or ValueError when malformed."""
        version, key, gauss = values["python"]
        numpy = dict(values["numpy"])
        numpy["state"] = {
            **numpy["state"],
            "key": np.asarray(numpy["state"]["key"], dtype=np.uint32),
        }
        device = values["torch_device"]
        return cls(
            (version, tuple(key), gauss),
            numpy,
            _bytes_tensor(values["torch_cpu"]),
            None if device is None else _bytes_tensor(device),
        )


def _bytes_tensor(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
