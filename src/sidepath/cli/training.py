"""The verb train: from data and a base to a saved adapter (floor 7)."""

from __future__ import annotations

from collections.abc import Mapping
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
from sidepath.cli.beside import composing, load_beside, tell_silent
from sidepath.cli.folders import require_output
from sidepath.cli.following import checkpoints_of, drop_checkpoints, follow, require_no_leftovers
from sidepath.cli.launch import joined, restarted
from sidepath.cli.new_tokens import all_new, tell_tokens
from sidepath.cli.outcome import Outcome, record, report
from sidepath.cli.output import Report, Table, note
from sidepath.cli.runs import TrainRun
from sidepath.cli.settings import toml
from sidepath.cli.surface import Call
from sidepath.config import TrainConfig
from sidepath.data.dataset import Data, load_data
from sidepath.injection.registry import check_name
from sidepath.methods import METHODS
from sidepath.methods.base import Method
from sidepath.store.adapter import Adapter, inject
from sidepath.store.new_tokens import add_tokens, with_rows
from sidepath.store.plan import Plan, plan, readable
from sidepath.store.saving import replaceable
from sidepath.training.evaluate import CAUSAL, GENERATED, evaluate
from sidepath.training.feed import largest_batch
from sidepath.training.forgetting import Forgetting, forgetting
from sidepath.training.history import FILE as HISTORY
from sidepath.training.loop import probe
from sidepath.training.loop import train as train_steps
from sidepath.training.processes import Processes

SETTINGS = "settings.toml"


def train(call: Call) -> Report:
    """Train an adapter on the user's data and save it with the settings that made it."""
    run = call.settings.build("run", TrainRun)
    with joined(run.distributed, run.device) as processes:
        return _train_in(processes, call, run)


def _train_in(processes: Processes, call: Call, run: TrainRun) -> Report:
    """The whole command in one of its processes; the first one writes."""
    settings = call.settings
    method = composing(settings.build(run.method, METHODS[run.method]), run.beside)
    config = settings.build("train", TrainConfig)
    output = Path(run.output)
    resume = _ready(run, output)
    folder = base_folder(run.base)
    tokenizer = load_tokenizer(folder)
    tokens = add_tokens(tokenizer, run.new_tokens)
    data, held_out = _data(run, config, folder, tokenizer, method.positions)
    text = _own_text(run, data, folder, method.positions)
    adapter, planned = _put_in(run, method, tokens, data, config, folder)
    if run.distributed == "fsdp":
        from sidepath.training.sharding import shard

        shard(adapter.model, processes)
    if run.dry_run:
        return _tried(adapter, data, config, planned)
    training = train_steps(
        adapter.model,
        data,
        config,
        adapter=adapter.name,
        held_out=held_out,
        checkpoints=checkpoints_of(output),
        resume=resume,
    )
    followed = follow(training, output, processes, run.track, settings.as_dict())
    metrics = _measured(adapter.model, held_out, config, processes)
    lost = _forgotten(adapter, data, run, text)
    outcome = Outcome(followed, metrics, lost, planned, data, training.history)
    if processes.first:
        _save(adapter, outcome, config, call, output)
    processes.wait()
    return report(outcome, output)


def _ready(run: TrainRun, output: Path) -> bool:
    """Whether to resume; raises when the output's place is not free for this run."""
    check_name(None, output.name)
    resume = run.resume or restarted()
    if not run.dry_run:
        require_output(output, overwrite=run.overwrite, ours=replaceable)
        if not resume:
            require_no_leftovers(output)
    return resume


def _put_in(
    run: TrainRun,
    method: Method,
    tokens: Mapping[str, int],
    data: Data,
    config: TrainConfig,
    folder: Path,
) -> tuple[Adapter, Plan]:
    """A fresh adapter on its base; the audit and the plan are told before it is put in."""
    torch.manual_seed(config.seed)
    model, method = _base_for(run, method, data, folder)
    tokens = all_new(tokens, data, model)
    method = with_rows(method, tokens)
    load_beside(model, run.beside)
    planned = _planned(model, method, data, config)
    _tell(data, planned, config)
    tell_tokens(tokens, data)
    adapter = inject(model, method, Path(run.output).name, new_tokens=tokens)
    tell_silent(adapter, run.beside)
    return adapter, planned


def _save(
    adapter: Adapter, outcome: Outcome, config: TrainConfig, call: Call, output: Path
) -> None:
    """Write the adapter with the settings that made it, and its history where there is one."""
    files = {SETTINGS: toml(call.settings)}
    if outcome.history is not None:
        files[HISTORY] = outcome.history.as_json()
    made = record(outcome, config, call.command)
    adapter.save(output, metrics=outcome.metrics, record=made, files=files)
    drop_checkpoints(output)


def _data(
    run: TrainRun, config: TrainConfig, folder: Path, tokenizer: Any, taken: int
) -> tuple[Data, Data | None]:
    limit = _limit(run, folder, taken)
    columns = run.columns or None
    data = load_data(
        run.data,
        tokenizer,
        weights=run.weights,
        max_tokens=limit,
        limit=run.limit,
        columns=columns,
        stream=run.stream,
    )
    if run.eval_data is not None:
        held_out = load_data(
            run.eval_data,
            tokenizer,
            max_tokens=limit,
            task=data.task,
            labels=data.labels or None,
            columns=columns,
            stream=run.stream,
        )
        return data, held_out
    if config.eval_share > 0:
        return data.split(config.eval_share, seed=config.seed)
    return data, None


def _own_text(run: TrainRun, data: Data, folder: Path, taken: int) -> Data | None:
    """The text to measure forgetting on, read before training so that a fault shows then."""
    if run.forgetting_data is None:
        return None
    return load_data(run.forgetting_data, data.tokenizer, max_tokens=_limit(run, folder, taken))


def _limit(run: TrainRun, folder: Path, taken: int) -> int:
    """The longest row: what was asked for, and never more than the adapter leaves of the base's
    context (2 at least: an adapter that takes it all is refused when it is put in).
    """
    context = context_tokens(folder)
    return run.max_tokens if context is None else min(run.max_tokens, max(2, context - taken))


def _base_for(run: TrainRun, method: Method, data: Data, folder: Path) -> tuple[nn.Module, Method]:
    """The base for these data; a head that no checkpoint filled is trained whole."""
    if data.task == "causal":
        return load_causal(folder, run.dtype, run.device, run.quantise), method
    model, fresh = load_classifier(
        folder, data.labels, data.pad_id, run.dtype, run.device, run.quantise
    )
    return model, method.with_heads(fresh)


def _planned(model: nn.Module, method: Method, data: Data, config: TrainConfig) -> Plan:
    """The plan, with the memory of the run's largest batch."""
    batch = largest_batch(data, config)
    rows, tokens = batch.ids_BT.shape
    mask = batch.attention_mask_BT
    return plan(
        model,
        method,
        batch_size=rows,
        tokens=tokens,
        checkpointing=config.gradient_checkpointing,
        supervised=batch.weight / (rows * tokens) if data.task == "causal" else 1.0,
        padded=mask is not None and not bool(mask.all()),
        autocast=config.autocast == "bfloat16",
        fused=config.kernels == "fused",
        logits=tokens - 1 - batch.first_target if data.task == "causal" else None,
        packed=config.packing,
    )


def _tell(data: Data, planned: Plan, config: TrainConfig) -> None:
    """The audit, and the plan with data types and memory, before the first step."""
    note(str(data.audit))
    note(str(planned))
    note(f"computing    autocast {config.autocast}; the optimizer's state in the adapter's dtype")


def _tried(adapter: Adapter, data: Data, config: TrainConfig, planned: Plan) -> Report:
    """What a dry run finds: one step's gradients reach every side path; nothing is changed."""
    step = probe(adapter.model, data, config, adapter=adapter.name)
    document = {
        "dry_run": True,
        "audit": data.audit.as_dict(),
        "plan": planned.as_dict(),
        "probe": {
            "loss": step.loss,
            "gradient_norm": step.gradient_norm,
            "tokens": step.tokens,
            "seconds": step.seconds,
            "steps": step.total,
        },
    }
    rows: list[list[object]] = [
        ["steps there would be", step.total],
        ["loss of the first one", step.loss],
        ["its gradient norm", step.gradient_norm],
        ["its seconds", step.seconds],
        ["memory of a step, predicted", readable(planned.memory.total)],
        ["adapter", readable(planned.adapter_bytes)],
    ]
    last = "a dry run: every side path got a gradient, nothing was trained and nothing written"
    return Report(document, [Table("", ["dry run", "value"], rows), last])


def _measured(
    model: nn.Module, held_out: Data | None, config: TrainConfig, processes: Processes
) -> dict[str, float]:
    if held_out is None:
        return {}
    names = [name for name in CAUSAL if name not in GENERATED]
    return evaluate(
        model,
        held_out,
        metrics=names if held_out.task == "causal" else None,
        batch_size=2 * config.batch_size,
        processes=processes,
    )


def _forgotten(adapter: Adapter, data: Data, run: TrainRun, text: Data | None) -> Forgetting | None:
    """In every process: where weights are sharded, all of them run the model."""
    if not run.forgetting:
        return None
    note("measuring what the base's own text has become to the adapted model")
    try:
        return forgetting(adapter.model, data.tokenizer, adapter=adapter.name, data=text)
    except Exception as error:  # whatever it is, it must not cost the adapter that was trained
        note(f"forgetting could not be measured: {error}")
        return None
