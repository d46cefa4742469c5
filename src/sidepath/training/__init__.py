"""Training (floor 5): data and their audit, the loop, checkpoints, evaluation."""

from __future__ import annotations

from sidepath.training.audit import Audit
from sidepath.training.batching import Batch
from sidepath.training.data import Data, load_data
from sidepath.training.evaluate import evaluate, generate
from sidepath.training.loop import train
from sidepath.training.report import StepReport

__all__ = [
    "Audit",
    "Batch",
    "Data",
    "StepReport",
    "evaluate",
    "generate",
    "load_data",
    "train",
]
