"""What the loop says after each step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StepReport:
    """One optimiser step."""

    number: int
    """The step, from 1."""
    total: int
    """Steps the run will take unless it stops early."""
    epoch: float
    """Passes over the training rows, this step included."""
    loss: float
    """Mean loss of the step's supervised tokens (or rows), in nats."""
    tokens: int
    """Tokens of the step, padding not counted."""
    tokens_per_second: float
    """`tokens` by the time of the step, evaluation and checkpoint not counted."""
    learning_rate: float
    """The rate this step used."""
    gradient_norm: float
    """Global gradient norm before clipping."""
    seconds: float
    """Time of the step, evaluation and checkpoint not counted."""
    held_out: dict[str, float] | None = None
    """Metrics on the held-out rows, when they were measured after this step."""
    best: bool = False
    """This step has the lowest held-out loss so far."""
    checkpoint: Path | None = None
    """The checkpoint written after this step."""
    notices: tuple[str, ...] = ()
    """What the user should know: resumed from where, stopped early, best state restored."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values that JSON holds."""
        checkpoint = None if self.checkpoint is None else str(self.checkpoint)
        return {
            **dataclasses.asdict(self),
            "checkpoint": checkpoint,
            "notices": list(self.notices),
        }
