"""The best state of a run by held-out loss, and when to stop waiting for a better one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sidepath.training.trained import Trained


@dataclass
class Best:
    """The lowest held-out loss so far, the step it was seen at, and the tensors then."""

    loss: float = math.inf
    step: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)
    stale: int = 0
    """Evaluations since then."""

    def offer(self, loss: float, step: int, trained: Trained) -> bool:
        """Take the model's present state if `loss` is the lowest; whether it was."""
        if loss < self.loss:
            self.loss, self.step, self.state, self.stale = loss, step, trained.snapshot(), 0
            return True
        self.stale += 1
        return False

    def put_back(self, trained: Trained, step: int) -> str | None:
        """Write the best state into the model that stands at `step`, in place; what to say."""
        if not self.state or self.step == step:
            return None
        trained.put(self.state)
        return f"the state of step {self.step} is back: held-out loss {self.loss:.4f}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values without the tensors."""
        loss = self.loss if self.state else None
        return {"loss": loss, "step": self.step, "stale": self.stale}

    @classmethod
    def from_dict(cls, values: dict[str, Any], state: dict[str, Tensor]) -> Best:
        """The inverse of `as_dict`."""
        loss = math.inf if values["loss"] is None else float(values["loss"])
        return cls(loss, int(values["step"]), state, int(values["stale"]))
