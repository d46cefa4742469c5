"""The methods of adaptation: one frozen config class each, in one explicit table (floor 2)."""

from __future__ import annotations

from sidepath.methods.base import Method
from sidepath.methods.intrinsic import IntrinsicDimension
from sidepath.methods.lora import LoRA
from sidepath.methods.plain import BitFit, FullFineTuning, LinearProbe

METHODS: dict[str, type[Method]] = {
    LoRA.method: LoRA,
    FullFineTuning.method: FullFineTuning,
    LinearProbe.method: LinearProbe,
    BitFit.method: BitFit,
    IntrinsicDimension.method: IntrinsicDimension,
}
"""Every method by its name on the command line and in files."""
