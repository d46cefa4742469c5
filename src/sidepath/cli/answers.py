"""The verbs that let a base or an adapter answer: eval and generate (floor 7)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from sidepath.cli.bases import (
    adapter_place,
    base_folder,
    context_tokens,
    load_causal,
    load_classifier,
    tokenizer_for,
)
from sidepath.cli.beside import load_beside, name_besides, require_use
from sidepath.cli.output import Report, Table, note, progress
from sidepath.cli.runs import BaseRun, EvalRun, GenerateRun
from sidepath.cli.surface import Call
from sidepath.errors import ConfigError, DataError
from sidepath.store import manifest as manifests

if TYPE_CHECKING:
    from sidepath.cli.inspect_run import InspectRun
    from sidepath.data.dataset import Data

NAME = "adapter"
"""What the answering adapter is called on the model, whatever its folder is called."""


def evaluate(call: Call) -> Report:
    """Metrics of a base, or of an adapter on it, on held-out data."""
    from sidepath.training.evaluate import evaluate as measure

    run = call.settings.build("eval", EvalRun)
    labels = labels_of(run.adapter)
    folder = base_folder(run.base)
    data = data_for(run, folder, labels, run.adapter)
    model = _answering(run, folder, data.labels, data.pad_id)
    note(f"measuring on {len(data):,} rows of {data.name}")
    metrics = measure(
        model,
        data,
        metrics=run.metrics,
        batch_size=run.batch_size,
        max_new_tokens=run.max_new_tokens,
    )
    table = Table(f"{len(data):,} rows", ["metric", "value"], list(metrics.items()))
    return Report({"metrics": metrics, "rows": len(data)}, [table])


def generate(call: Call) -> Report:
    """What a base, or an adapter on it, writes after each prompt."""
    from sidepath.training.evaluate import generate as complete

    run = call.settings.build("generate", GenerateRun)
    if bool(run.prompt) == (run.data is not None):
        raise ConfigError("give prompts with --prompt, or a file of them with --data; not both")
    if labels_of(run.adapter) is not None:
        raise ConfigError(
            "the adapter is a classifier: it writes no text",
            where=run.adapter,
            hint="sidepath eval measures it",
        )
    folder = base_folder(run.base)
    tokenizer = tokenizer_for(folder, run.adapter)
    prompts = list(run.prompt) or _prompts_of(run)
    model = _answering(run, folder, (), 0)
    outputs: list[dict[str, str]] = []
    with progress("prompts") as advance:
        for start in range(0, len(prompts), run.batch_size):
            batch = prompts[start : start + run.batch_size]
            texts = complete(
                model,
                tokenizer,
                batch,
                max_new_tokens=run.max_new_tokens,
                batch_size=run.batch_size,
                temperature=run.temperature,
                seed=run.seed + start,
            )
            outputs += [
                {"prompt": prompt, "text": text} for prompt, text in zip(batch, texts, strict=True)
            ]
            advance(len(outputs), len(prompts))
    rows = [[output["prompt"], output["text"]] for output in outputs]
    return Report({"outputs": outputs}, [Table("", ["prompt", "text"], rows)])


def data_for(
    run: EvalRun | InspectRun,
    folder: Path,
    labels: Sequence[str] | None,
    adapter: str | Path | None,
) -> Data:
    """The rows that a base, or an adapter of these classes on it, is measured on."""
    from sidepath.data.dataset import load_data

    return load_data(
        str(run.data),
        tokenizer_for(folder, adapter),
        max_tokens=min(run.max_tokens, context_tokens(folder) or run.max_tokens),
        limit=run.limit,
        task="auto" if labels is None else "classify",
        labels=labels,
        columns=run.columns,
    )


def model_for(run: BaseRun, folder: Path, labels: Sequence[str], pad_id: int) -> nn.Module:
    """The base, with a head for these classes where there are any."""
    if labels:
        options = (run.dtype, run.device, run.quantise)
        return load_classifier(folder, labels, pad_id, *options)[0]
    return load_causal(folder, run.dtype, run.device, run.quantise)


def _answering(
    run: EvalRun | GenerateRun, folder: Path, labels: tuple[str, ...], pad_id: int
) -> nn.Module:
    """The base with the adapter, if any, active on it, and those it composes beside it."""
    from sidepath.injection.surgery import activate
    from sidepath.store.adapter import load

    if labels and run.adapter is None:
        raise DataError(
            "a base alone has no classification head",
            where=run.data,
            hint="give the adapter that was trained on such data with --adapter",
        )
    model = model_for(run, folder, labels, pad_id)
    if run.adapter is not None:
        load_beside(model, run.beside, allow_other_base=run.allow_other_base)
        name = name_besides(NAME, run.beside)
        adapter = load(model, run.adapter, name, allow_other_base=run.allow_other_base)
        require_use(adapter.config, run.beside)
        activate(model, name)
    return model.eval()


def labels_of(adapter: str | Path | None) -> tuple[str, ...] | None:
    """The classes an adapter was trained to tell apart, or None when it is no classifier."""
    if adapter is None:
        return None
    folder = adapter_place(str(adapter))
    if not manifests.is_ours(folder):
        return None
    labels = manifests.trusted_manifest(folder).labels
    return tuple(labels) if labels else None


def _prompts_of(run: GenerateRun) -> list[str]:
    from sidepath.data.faults import lines_of
    from sidepath.data.rows import renamed, require_columns
    from sidepath.data.sources import open_source

    source = open_source(str(run.data), run.limit)
    prompts: list[str] = []
    for number, rows in enumerate(source.chunks()):
        if number == 0:
            require_columns(source, rows, run.columns)
        for row in renamed(rows, run.columns):
            prompt = row.fields.get("prompt")
            if isinstance(prompt, str) and prompt:
                prompts.append(prompt)
            else:
                source.fault(row.line, "no prompt")
    faults = lines_of([(source.unit, source.faults)])
    if faults or not prompts:
        raise DataError(
            "the prompts have faults" if faults else "there are no prompts",
            where=run.data,
            faults=faults,
            expected="a text in the column `prompt`",
            hint="name the column with --columns prompt=NAME",
        )
    return prompts
