"""The methods of adaptation: one frozen config class each, in one explicit table (floor 2)."""

from __future__ import annotations

from sidepath.methods.base import Method
from sidepath.methods.bottleneck import Bottleneck
from sidepath.methods.fusion import AdapterFusion
from sidepath.methods.intrinsic import IntrinsicDimension
from sidepath.methods.lora import LoRA
from sidepath.methods.plain import BitFit, FullFineTuning, LinearProbe
from sidepath.methods.prefix import PrefixTuning
from sidepath.methods.prompt import PromptTuning
from sidepath.methods.vera import VeRA
from sidepath.methods.versatile import VersatileLM

METHODS: dict[str, type[Method]] = {
    LoRA.method: LoRA,
    FullFineTuning.method: FullFineTuning,
    LinearProbe.method: LinearProbe,
    BitFit.method: BitFit,
    PromptTuning.method: PromptTuning,
    PrefixTuning.method: PrefixTuning,
    VeRA.method: VeRA,
    Bottleneck.method: Bottleneck,
    VersatileLM.method: VersatileLM,
    AdapterFusion.method: AdapterFusion,
    IntrinsicDimension.method: IntrinsicDimension,
}
"""Every method by its name on the command line and in files."""
