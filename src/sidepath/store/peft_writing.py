"""An adapter of ours in PEFT's settings: the `adapter_config.json` of its folder (floor 4)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from sidepath.core.views import view_of
from sidepath.injection.architecture import modules_of
from sidepath.methods.base import Site
from sidepath.methods.lora import LoRA
from sidepath.store.peft_config import BIAS, commonest, number, patterns_for, targets_for
from sidepath.store.peft_format import groups_of
from sidepath.store.peft_tokens import indices_for

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Heads that PEFT trains whole on its own for a task, and insists on finding in the file."""


def write_settings(
    model: nn.Module,
    config: LoRA,
    sites: Mapping[str, Site],
    base_name: str | None,
    base_revision: str | None = None,
) -> dict[str, Any]:
    """The `adapter_config.json` with which PEFT computes what we compute.

    Modules are named by their whole paths. Parts and groups raise a module's rank to m r (see
    `peft_format`); its alpha rises with it so that the factor stays the same.
    """
    modules = dict(modules_of(model))
    dense = [path for path, site in sites.items() if site.kind == "dense"]
    ranks, alphas = _of_whole_modules(config, [sites[path] for path in dense], modules)
    r = commonest(ranks.values()) if ranks else config.r
    alpha = commonest(alphas.values()) if alphas else number(config.alpha)
    whole = [path for path, site in sites.items() if site.kind == "whole"]
    kinds = {view.kind for path in dense if (view := view_of(modules[path])) is not None}
    return {
        "peft_type": "LORA",
        "task_type": _task(model, whole, modules),
        "base_model_name_or_path": base_name,
        "revision": base_revision,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.scaling == "alpha/sqrt(r)",
        "use_dora": config.dora,
        "bias": BIAS[config.bias],
        "fan_in_fan_out": "conv1d_transposed" in kinds and "linear" not in kinds,
        "init_lora_weights": True,
        "target_modules": targets_for(dense, modules),
        "modules_to_save": whole or None,
        "rank_pattern": patterns_for(ranks, r),
        "alpha_pattern": patterns_for(alphas, alpha),
        **indices_for(sites, modules, config.token_rows),
    }


def _of_whole_modules(
    config: LoRA, sites: Iterable[Site], modules: Mapping[str, nn.Module]
) -> tuple[dict[str, int], dict[str, float]]:
    """PEFT's rank and alpha of each module; all of its parts and groups are one update there."""
    ranks, alphas = {}, {}
    for site in sites:
        view = view_of(modules[site.path])
        times = (len(site.parts) or 1) * (groups_of(view) if view else 1)
        root = times if config.scaling == "alpha/r" else math.sqrt(times)
        ranks[site.path] = config.rank_of(site.path) * times
        alphas[site.path] = number(config.alpha_of(site.path) * root)
    return ranks, alphas


def _task(model: nn.Module, whole: list[str], modules: Iterable[str]) -> str | None:
    name = next((kind.__name__ for kind in type(model).__mro__ if _task_of(kind.__name__)), "")
    task = _task_of(name)
    heads = [path for path in modules if path.endswith(_TASK_HEADS.get(task or "", ()))]
    return task if all(path in whole for path in heads) else None


def _task_of(name: str) -> str | None:
    return next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)
