"""The methods of adaptation: one frozen config class each, in one explicit table (floor 2)."""

from __future__ import annotations

from sidepath.methods.base import Method
from sidepath.methods.lora import LoRA

METHODS: dict[str, type[Method]] = {LoRA.method: LoRA}
"""Every method by its name on the command line and in files."""
