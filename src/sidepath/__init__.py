"""Sidepath: low-rank adaptation of language models, with proof.

    import sidepath
    from sidepath import LoRA, TrainConfig

Names are loaded on first use, so that `import sidepath` itself is quick and brings in no
server, plotting, dataset or metric library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sidepath import errors as errors
    from sidepath.base import embedded_base as embedded_base
    from sidepath.combining.combine import combine as combine
    from sidepath.combining.extract import extract as extract
    from sidepath.combining.recipe import Combination as Combination
    from sidepath.combining.recipe import Extraction as Extraction
    from sidepath.config import TrainConfig as TrainConfig
    from sidepath.data.dataset import load_data as load_data
    from sidepath.injection.merging import merge as merge
    from sidepath.injection.merging import unmerge as unmerge
    from sidepath.injection.quantising import dequantise_ as dequantise_
    from sidepath.injection.quantising import quantise_ as quantise_
    from sidepath.injection.surgery import activate as activate
    from sidepath.injection.surgery import disabled as disabled
    from sidepath.injection.surgery import remove as remove
    from sidepath.injection.surgery import route as route
    from sidepath.injection.surgery import use_kernels as use_kernels
    from sidepath.merging.merge import merge_folder as merge_folder
    from sidepath.methods.bottleneck import Bottleneck as Bottleneck
    from sidepath.methods.fusion import AdapterFusion as AdapterFusion
    from sidepath.methods.intrinsic import IntrinsicDimension as IntrinsicDimension
    from sidepath.methods.lora import LoRA as LoRA
    from sidepath.methods.plain import BitFit as BitFit
    from sidepath.methods.plain import FullFineTuning as FullFineTuning
    from sidepath.methods.plain import LinearProbe as LinearProbe
    from sidepath.methods.prefix import PrefixTuning as PrefixTuning
    from sidepath.methods.prompt import PromptTuning as PromptTuning
    from sidepath.methods.vera import VeRA as VeRA
    from sidepath.methods.versatile import VersatileLM as VersatileLM
    from sidepath.store.adapter import Adapter as Adapter
    from sidepath.store.adapter import inject as inject
    from sidepath.store.adapter import load as load
    from sidepath.store.eva import inject_eva as inject_eva
    from sidepath.store.library import Library as Library
    from sidepath.store.new_tokens import add_tokens as add_tokens
    from sidepath.store.plan import Plan as Plan
    from sidepath.store.plan import plan as plan
    from sidepath.training.evaluate import evaluate as evaluate
    from sidepath.training.evaluate import generate as generate
    from sidepath.training.forgetting import forgetting as forgetting
    from sidepath.training.loop import StepReport as StepReport
    from sidepath.training.loop import train as train
    from sidepath.training.together import train_together as train_together

_HOMES = {
    "Adapter": "sidepath.store.adapter",
    "AdapterFusion": "sidepath.methods.fusion",
    "BitFit": "sidepath.methods.plain",
    "Bottleneck": "sidepath.methods.bottleneck",
    "Combination": "sidepath.combining.recipe",
    "Extraction": "sidepath.combining.recipe",
    "FullFineTuning": "sidepath.methods.plain",
    "IntrinsicDimension": "sidepath.methods.intrinsic",
    "Library": "sidepath.store.library",
    "LinearProbe": "sidepath.methods.plain",
    "LoRA": "sidepath.methods.lora",
    "Plan": "sidepath.store.plan",
    "PrefixTuning": "sidepath.methods.prefix",
    "PromptTuning": "sidepath.methods.prompt",
    "StepReport": "sidepath.training.loop",
    "TrainConfig": "sidepath.config",
    "VeRA": "sidepath.methods.vera",
    "VersatileLM": "sidepath.methods.versatile",
    "activate": "sidepath.injection.surgery",
    "add_tokens": "sidepath.store.new_tokens",
    "combine": "sidepath.combining.combine",
    "dequantise_": "sidepath.injection.quantising",
    "disabled": "sidepath.injection.surgery",
    "embedded_base": "sidepath.base",
    "errors": "sidepath.errors",
    "evaluate": "sidepath.training.evaluate",
    "extract": "sidepath.combining.extract",
    "forgetting": "sidepath.training.forgetting",
    "generate": "sidepath.training.evaluate",
    "inject": "sidepath.store.adapter",
    "inject_eva": "sidepath.store.eva",
    "load": "sidepath.store.adapter",
    "load_data": "sidepath.data.dataset",
    "merge": "sidepath.injection.merging",
    "merge_folder": "sidepath.merging.merge",
    "plan": "sidepath.store.plan",
    "quantise_": "sidepath.injection.quantising",
    "remove": "sidepath.injection.surgery",
    "route": "sidepath.injection.surgery",
    "train": "sidepath.training.loop",
    "train_together": "sidepath.training.together",
    "unmerge": "sidepath.injection.merging",
    "use_kernels": "sidepath.injection.surgery",
}

__all__ = [
    "Adapter",
    "AdapterFusion",
    "BitFit",
    "Bottleneck",
    "Combination",
    "Extraction",
    "IntrinsicDimension",
    "Library",
    "LoRA",
    "Plan",
    "PrefixTuning",
    "PromptTuning",
    "StepReport",
    "TrainConfig",
    "VeRA",
    "VersatileLM",
    "__version__",
    "activate",
    "add_tokens",
    "combine",
    "dequantise_",
    "disabled",
    "embedded_base",
    "errors",
    "evaluate",
    "extract",
    "forgetting",
    "generate",
    "inject",
    "inject_eva",
    "load",
    "load_data",
    "merge",
    "merge_folder",
    "plan",
    "quantise_",
    "remove",
    "route",
    "train",
    "train_together",
    "unmerge",
    "use_kernels",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sidepath' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    value = home if name == "errors" else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
