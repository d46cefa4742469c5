"""One trial: a fresh base, an adapter on it, trained and measured; nothing of it is kept."""

from __future__ import annotations

import gc
import math
import statistics
from typing import Any

import torch
from torch import nn

from sidepath.compare.entrants import Entrant
from sidepath.compare.material import Material, material_of
from sidepath.compare.setting import Setting, Trial
from sidepath.data.dataset import Data
from sidepath.errors import MissingExtra, NonFinite, SidepathError
from sidepath.injection.architecture import modules_of
from sidepath.store.adapter import Adapter, inject
from sidepath.store.plan import file_bytes
from sidepath.training.evaluate import evaluate
from sidepath.training.loop import train
from sidepath.training.measured import Peak, watched

NAME = "entrant"


def run_trial(setting: Setting, trial: Trial) -> dict[str, Any]:
    """The figures of one trial, or {"failed": why} where the method cannot be trained so.

    The same setting and trial give the same figures but for the times: fresh weights, the start
    of the adapter, the order of the rows and dropout all follow from the trial's seed. (With
    another number of threads, rounding may differ.) `seconds` is the median step's time, times
    the steps: the steps in which memory is counted take longer and do not count so. Where features
    are computed once, early in the run, the time of that is added.
    Raises: `MissingExtra`; whatever the data's checks raise.
    """
    material = material_of(setting)
    try:
        return _figures(setting, trial, material)
    except MissingExtra:  # says nothing of the method, and must not be remembered as if it did
        raise
    except SidepathError as error:
        return {"failed": str(error)}
    finally:
        gc.collect()  # adapters and their modules refer to one another: a cycle holds a model


def fresh(setting: Setting, entrant: Entrant, seed: int) -> Adapter:
    """An entrant on a base that is as it was on disk. Raises what `inject` raises."""
    material = material_of(setting)
    torch.manual_seed(seed)
    model, heads = base_for(setting, material)
    return inject(model, entrant.config.with_heads(heads) if heads else entrant.config, NAME)


def base_for(setting: Setting, material: Material) -> tuple[nn.Module, tuple[str, ...]]:
    """The base for the task, and its heads that no checkpoint filled (torch's random state)."""
    if material.train.task == "causal":
        return setting.bases.causal(), ()
    return setting.bases.classifier(material.train.labels, material.train.pad_id)


def facts_of(adapter: Adapter) -> dict[str, int]:
    """What an adapter trains, and the bytes of its file."""
    return {
        "trainable": sum(parameter.numel() for parameter in adapter.parameters()),
        "bytes": file_bytes(adapter.installed, dict(modules_of(adapter.model))),
    }


def _figures(setting: Setting, trial: Trial, material: Material) -> dict[str, Any]:
    adapter = fresh(setting, trial.entrant, trial.seed)
    final = trial.phase == "final"
    rows = material.train if final else material.fit
    peak = Peak()
    steps = train(adapter.model, rows, trial.train_config(setting), adapter=NAME)
    reports = list(watched(steps, adapter.model, peak, also=steps.largest_step) if final else steps)
    seconds = statistics.median(report.seconds for report in reports) * len(reports)
    seconds += steps.feature_seconds
    judged = material.test if final else material.validation
    return {
        **facts_of(adapter),
        "steps": len(reports),
        "seconds": seconds,
        "peak_memory_bytes": peak.bytes if final else None,
        "first_loss": reports[0].loss,
        "last_loss": reports[-1].loss,
        **_measured(setting, material, adapter.model, judged),
    }


def _measured(
    setting: Setting, material: Material, model: nn.Module, rows: Data
) -> dict[str, float]:
    names = list(dict.fromkeys(["loss", material.metric]))
    found = evaluate(
        model,
        rows,
        metrics=names,
        batch_size=max(32, 2 * setting.train.batch_size),
        max_new_tokens=setting.max_new_tokens,
    )
    value, loss = found[material.metric], found["loss"]
    if not (math.isfinite(value) and math.isfinite(loss)):  # a NaN would win or lose by chance
        raise NonFinite(f"after training, the {material.metric} is {value} and the loss {loss}")
    return {"value": value, "loss": loss}
