"""The short verbs: plan, merge, config, bench, demo (floor 7)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sidepath.cli.output import Report, Table, note, progress
from sidepath.cli.runs import BenchRun, DemoRun, MergeRun, PlanRun
from sidepath.cli.settings import toml
from sidepath.cli.surface import Call


def plan(call: Call) -> Report:
    """What an adapter of these settings would be on the model; nothing is loaded or changed."""
    from sidepath.cli.bases import config_place
    from sidepath.cli.new_tokens import rows_of
    from sidepath.methods import METHODS
    from sidepath.store.configs import model_without_weights
    from sidepath.store.new_tokens import with_rows
    from sidepath.store.plan import plan as plan_of

    run = call.settings.build("plan", PlanRun)
    config = call.settings.build(str(call.method), METHODS[str(call.method)])
    model = model_without_weights(config_place(call.places[0]), run.dtype)
    tokens = {text: rows_of(model) + n for n, text in enumerate(dict.fromkeys(run.new_tokens))}
    config = with_rows(config, tokens)
    found = plan_of(
        model,
        config,
        batch_size=run.batch_size,
        tokens=run.max_tokens,
        gpu_bytes=None if run.gpu_gib is None else round(run.gpu_gib * 2**30),
    )
    return Report(found.as_dict(), [str(found)])


def merge(call: Call) -> Report:
    """A plain transformers folder with the adapters folded in, and the measured parity."""
    from sidepath.cli.bases import base_folder
    from sidepath.cli.calibration import calibration_of
    from sidepath.cli.folders import require_output
    from sidepath.merging.merge import merge_folder, replaceable
    from sidepath.store.configs import quiet

    run = call.settings.build("merge", MergeRun)
    base, *adapters, output = call.places
    require_output(Path(output), overwrite=run.overwrite, ours=replaceable)
    calibration = None if run.data is None else calibration_of(run.data)
    quiet()
    note(f"merging {', '.join(adapters)} into a copy of {base}")
    found = merge_folder(
        base_folder(base),
        adapters,
        Path(output),
        skip_parity=run.skip_parity,
        calibration=calibration,
        dtype=None if run.dtype == "auto" else run.dtype,
        allow_other_base=run.allow_other_base,
        requantise=None if run.quantise == "none" else run.quantise,
    )
    document = found.as_dict()
    return Report(document, _told_of_merge(document, run))


def _told_of_merge(document: Mapping[str, Any], run: MergeRun) -> list[str | Table]:
    rows = [[name, value] for name, value in (document["parity"] or {}).items()]
    table = Table("parity: merged against un-merged", ["measure", "value"], rows)
    told: list[str | Table] = [f"merged model in {document['output']}", *([table] if rows else [])]
    told += [
        f"most memory resident, {part}: {peak / 2**20:,.0f} MiB"
        for part, peak in document["peak_memory_bytes"].items()
        if peak is not None
    ]
    carried = document["carried"]
    if carried["tensors"]:
        first = ", ".join(carried["names"][:3])
        told.append(
            f"{carried['tensors']} tensors of the base, {carried['bytes']:,} bytes, that its model "
            f"has no place for were carried over as they are: {first}"
        )
    if document["dequantised"]:
        told.append(f"{document['dequantised']} weights of the 4-bit base were dequantised")
    left = document.get("requantised")
    if left is not None:
        layers = [[one["name"], one["share"], one["relative_error"]] for one in left["layers"]]
        title = f"packed into {run.quantise} again, this is left of the update"
        total = ["all layers", left["share"], left["relative_error"]]
        told.append(Table(title, ["layer", "share", "relative error"], [*layers, total]))
    return told


def config(call: Call) -> Report:
    """Each setting that `train` would use, and where it came from; impossible ones are errors."""
    for section, cls in call.settings.sections.items():
        if not call.settings.missing(section):
            call.settings.build(section, cls)
    return Report(call.settings.as_dict(), [toml(call.settings).rstrip("\n")])


def bench(call: Call) -> Report:
    """Every figure, or those named, beside its peer and what it is to reach."""
    from sidepath.bench.report import (
        HEAD,
        notes,
        table_rows,
        write,
    )
    from sidepath.bench.setting import Bench
    from sidepath.bench.table import chosen, measured
    from sidepath.cli.bases import device_of
    from sidepath.cli.folders import require_place
    from sidepath.page import PICTURE_MISSING, has_matplotlib
    from sidepath.store.configs import quiet

    run = call.settings.build("bench", BenchRun)
    names = chosen(call.places)
    folder = None if run.output is None else Path(run.output)
    if folder is not None:
        require_place(folder)
    quiet()
    setting = Bench(run.rounds, device_of(run.device), run.quick)
    with progress("figures") as advance:
        found, document = measured(names, setting, threads=run.threads, progress=advance)
    told: list[str | Table] = [Table("", HEAD, table_rows(found)), "", *notes(found, document)]
    if folder is not None:
        told.append(f"in {folder}: {', '.join(write(folder, found, document))}")
        if not has_matplotlib():
            told.append(PICTURE_MISSING)
    return Report(document, told)


def demo(call: Call) -> Report:
    """The whole demonstration on the embedded base."""
    from sidepath.demo.report import SCORE_HEAD, facts, samples, score_rows
    from sidepath.demo.run import run_demo
    from sidepath.store.configs import quiet

    run = call.settings.build("demo", DemoRun)
    quiet()
    found: Mapping[str, Any] = run_demo(
        Path(run.output), seed=run.seed, progress=progress, say=note
    )
    table = Table("", SCORE_HEAD, score_rows(found["tasks"]))
    return Report(found, ["", *samples(found["tasks"]), "", table, "", *facts(found)])
