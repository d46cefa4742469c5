"""What a training run came to: the record saved with the adapter, and the report (floor 7)."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sidepath.cli.following import Followed
from sidepath.cli.output import Report, Table
from sidepath.config import TrainConfig
from sidepath.data.audit import Audit
from sidepath.data.dataset import Data
from sidepath.store.hub import PREFIX
from sidepath.store.plan import Plan, readable
from sidepath.training.forgetting import Forgetting
from sidepath.training.history import History


@dataclass(frozen=True)
class Outcome:
    """What training left behind."""

    followed: Followed
    metrics: dict[str, float]
    forgetting: Forgetting | None
    planned: Plan
    data: Data
    history: History | None
    """Where the run was watched."""

    @property
    def memory(self) -> dict[str, Any]:
        """Bytes of a step at its peak: what the plan said, and what was measured, and how."""
        peak = self.followed.peak
        predicted = self.planned.memory.total
        return {"predicted": predicted, "measured": peak.bytes or None, "how": peak.how}


def record(outcome: Outcome, config: TrainConfig, command: str) -> dict[str, Any]:
    """What `sidepath.json` keeps of how the adapter came to be."""
    data, lost = outcome.data, outcome.forgetting
    return {
        "task": data.task,
        "data": {
            "name": ", ".join(_short(part.name) for part in data.parts),
            "rows": data.audit.rows,
            "digest": data.digest,
        },
        "audit": _audit(data.audit),
        "memory": outcome.memory,
        "adapter_bytes": {"predicted": outcome.planned.adapter_bytes},
        "seed": config.seed,
        "steps": outcome.followed.steps,
        "loss": outcome.followed.losses,
        "forgetting": None if lost is None else lost.as_dict(),
        "command": command,
    }


def _audit(audit: Audit) -> dict[str, Any]:
    """The audit without the rows it shows: those are the user's own, and adapters are published."""
    values = {name: value for name, value in audit.as_dict().items() if name != "samples"}
    portions = [{**portion, "name": _short(portion["name"])} for portion in values["portions"]]
    return {**values, "portions": portions}


def _short(name: str) -> str:
    """A file without its folder; the whole name of a data set on the hub."""
    return name if name.startswith(PREFIX) else Path(name).name


def report(outcome: Outcome, output: Path) -> Report:
    """The result of `sidepath train`."""
    followed, lost = outcome.followed, outcome.forgetting
    losses, memory = followed.losses, outcome.memory
    document = {
        "adapter": str(output),
        "steps": outcome.followed.steps,
        "loss": losses,
        "metrics": outcome.metrics,
        "forgetting": None if lost is None else lost.as_dict(),
        "audit": outcome.data.audit.as_dict(),
        "plan": outcome.planned.as_dict(),
        "memory": memory,
        "peak_memory_bytes": peak_memory(),
        "seconds": followed.seconds,
    }
    rows: list[list[object]] = [
        ["steps", outcome.followed.steps],
        ["first loss", losses["first"]],
        ["last loss", losses["last"]],
        *[[f"held out: {name}", value] for name, value in outcome.metrics.items()],
        *_forgotten(lost),
        ["memory of a step, predicted", readable(memory["predicted"])],
        ["memory of a step, measured", _size(memory["measured"])],
        ["peak memory of the process", readable(peak_memory())],
        ["seconds", followed.seconds],
    ]
    return Report(document, [Table("", ["training", "value"], rows), f"adapter in {output}"])


def _size(count: int | None) -> str | None:
    return None if count is None else readable(count)


def _forgotten(lost: Forgetting | None) -> list[list[object]]:
    if lost is None:
        return []
    return [[f"loss of text {lost.source}", f"{lost.before:.4g} before, {lost.after:.4g} after"]]


def peak_memory() -> int:
    """Most memory the process held, in bytes: the GPU's where one was used, else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return int(torch.cuda.max_memory_allocated())
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
