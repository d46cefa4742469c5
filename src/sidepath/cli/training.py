"""The verb train: from data and a base to a saved adapter (floor 7)."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sidepath.cli.bases import (
    base_folder,
    context_tokens,
    load_causal,
    load_classifier,
    load_tokenizer,
)
from sidepath.cli.folders import require_output
from sidepath.cli.output import Report, Table, note, progress
from sidepath.cli.runs import TrainRun
from sidepath.cli.settings import toml
from sidepath.cli.surface import Call
from sidepath.config import TrainConfig
from sidepath.errors import ConfigError, StoreError
from sidepath.injection.registry import check_name
from sidepath.methods import METHODS
from sidepath.methods.base import Method
from sidepath.methods.lora import LoRA
from sidepath.store.adapter import Adapter, inject
from sidepath.store.folder import lists_all_files
from sidepath.store.plan import Plan, plan
from sidepath.training.data import Data, load_data
from sidepath.training.evaluate import CAUSAL, GENERATED, evaluate
from sidepath.training.loop import train as train_steps
from sidepath.training.report import StepReport

SETTINGS = "settings.toml"
CHECKPOINTS = ".checkpoints"


@dataclass(frozen=True)
class Trained:
    """What training left behind."""

    reports: list[StepReport]
    metrics: dict[str, float]
    peak_memory_bytes: int
    seconds: float


def train(call: Call) -> Report:
    """Train an adapter on the user's data and save it with the settings that made it."""
    settings = call.settings
    run = settings.build("run", TrainRun)
    method = settings.build(run.method, METHODS[run.method])
    config = settings.build("train", TrainConfig)
    output = Path(run.output)
    check_name(None, output.name)
    require_output(output, overwrite=run.overwrite)
    if not run.resume:
        _require_no_leftovers(output)
    folder = base_folder(run.base)
    data, held_out = _data(run, config, folder)
    torch.manual_seed(config.seed)
    model, method = _base_for(run, method, data, folder)
    planned = plan(model, method, batch_size=config.batch_size, tokens=data.audit.longest)
    _tell(data, planned, config)
    adapter = inject(model, method, output.name)
    done = _train(adapter, data, held_out, config, run)
    record = _record(call.command, run, config, data, done)
    adapter.save(output, metrics=done.metrics, record=record, files={SETTINGS: toml(settings)})
    _drop_checkpoints(output)
    return _report(output, data, planned, done)


def _require_no_leftovers(output: Path) -> None:
    left = _checkpoints_of(output)
    if any(left.glob("*")):
        raise StoreError(
            "an unfinished run of this output left checkpoints",
            where=left,
            hint="go on with --resume, or delete that folder",
        )


def _checkpoints_of(output: Path) -> Path:
    return output.with_name(output.name + CHECKPOINTS)


def _drop_checkpoints(output: Path) -> None:
    """A saved adapter needs no checkpoint any more; what else lies in their folder is left."""
    folder = _checkpoints_of(output)
    for path in folder.glob("*"):
        if path.is_dir() and lists_all_files(path):
            shutil.rmtree(path)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _data(run: TrainRun, config: TrainConfig, folder: Path) -> tuple[Data, Data | None]:
    tokenizer = load_tokenizer(folder)
    limit = min(run.max_tokens, context_tokens(folder) or run.max_tokens)
    columns = run.columns or None
    data = load_data(run.data, tokenizer, max_tokens=limit, limit=run.limit, columns=columns)
    if run.eval_data is not None:
        held_out = load_data(
            run.eval_data,
            tokenizer,
            max_tokens=limit,
            task=data.task,
            labels=data.labels or None,
            columns=columns,
        )
        return data, held_out
    if config.eval_share > 0:
        return data.split(config.eval_share, seed=config.seed)
    return data, None


def _base_for(run: TrainRun, method: Method, data: Data, folder: Path) -> tuple[nn.Module, Method]:
    """The base for these data; a head that no checkpoint filled is trained whole."""
    if data.task == "causal":
        return load_causal(folder, run.dtype, run.device, run.quantise), method
    model, fresh = load_classifier(
        folder, data.labels, data.pad_id, run.dtype, run.device, run.quantise
    )
    if not isinstance(method, LoRA):
        raise ConfigError(f"method {method.method} cannot learn text with labels")
    whole = (*method.train_whole, *(head for head in fresh if head not in method.train_whole))
    return model, dataclasses.replace(method, train_whole=whole)


def _tell(data: Data, planned: Plan, config: TrainConfig) -> None:
    """The audit, and the plan with data types and memory, before the first step."""
    note(str(data.audit))
    note(str(planned))
    note(f"computing    autocast {config.autocast}; the optimizer's state in the adapter's dtype")


def _train(
    adapter: Adapter, data: Data, held_out: Data | None, config: TrainConfig, run: TrainRun
) -> Trained:
    folder = _checkpoints_of(Path(run.output))
    wanted = config.checkpoint_every > 0 or run.resume
    began = time.perf_counter()
    steps = train_steps(
        adapter.model,
        data,
        config,
        adapter=adapter.name,
        held_out=held_out,
        checkpoints=folder if wanted else None,
        resume=run.resume,
    )
    reports: list[StepReport] = []
    with progress("step") as advance:
        for report in steps:
            reports.append(report)
            for text in report.notices:
                note(text)
            advance(report.number, report.total, _facts(report))
    metrics: dict[str, float] = {}
    if held_out is not None:
        names = [name for name in CAUSAL if name not in GENERATED]
        metrics = evaluate(
            adapter.model,
            held_out,
            metrics=names if data.task == "causal" else None,
            batch_size=2 * config.batch_size,
        )
    return Trained(reports, metrics, peak_memory(), time.perf_counter() - began)


def _facts(report: StepReport) -> str:
    held_out = "" if report.held_out is None else f", held out {report.held_out['loss']:.4f}"
    return f"loss {report.loss:.4f}{held_out}, {report.tokens_per_second:,.0f} tokens/s"


def peak_memory() -> int:
    """Most memory the process held, in bytes: the GPU's where one was used, else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return int(torch.cuda.max_memory_allocated())
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _record(
    command: str, run: TrainRun, config: TrainConfig, data: Data, done: Trained
) -> dict[str, Any]:
    audit = data.audit
    return {
        "task": data.task,
        "data": {"name": Path(run.data).name, "rows": audit.rows, "digest": data.digest},
        "seed": config.seed,
        "steps": done.reports[-1].number if done.reports else 0,
        "loss": _losses(done),
        "command": command,
    }


def _losses(done: Trained) -> dict[str, float | None]:
    losses = [report.loss for report in done.reports]
    return {"first": losses[0], "last": losses[-1]} if losses else {"first": None, "last": None}


def _report(output: Path, data: Data, planned: Plan, done: Trained) -> Report:
    document = {
        "adapter": str(output),
        "steps": done.reports[-1].number if done.reports else 0,
        "loss": _losses(done),
        "metrics": done.metrics,
        "audit": data.audit.as_dict(),
        "plan": planned.as_dict(),
        "peak_memory_bytes": done.peak_memory_bytes,
        "seconds": done.seconds,
    }
    rows: list[list[object]] = [
        ["steps", document["steps"]],
        ["first loss", _losses(done)["first"]],
        ["last loss", _losses(done)["last"]],
        *[[f"held out: {name}", value] for name, value in done.metrics.items()],
        ["peak memory, MiB", done.peak_memory_bytes // 2**20],
        ["seconds", done.seconds],
    ]
    return Report(document, [Table("", ["training", "value"], rows), f"adapter in {output}"])
