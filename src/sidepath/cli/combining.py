"""The verbs combine and extract (floor 7)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sidepath.cli.bases import base_folder
from sidepath.cli.combining_run import CombineRun, ExtractRun
from sidepath.cli.folders import require_output
from sidepath.cli.output import Report, Table, note, progress
from sidepath.cli.surface import Call
from sidepath.combining.combine import combine as combine_adapters
from sidepath.combining.extract import extract as extract_adapter
from sidepath.store.saving import replaceable

_COLUMNS = ("layer", "r", "norm", "error")


def combine(call: Call) -> Report:
    """One adapter made of several, and the error of each layer."""
    run = call.settings.build("combine", CombineRun)
    *adapters, output = call.places
    require_output(Path(output), overwrite=run.overwrite, ours=replaceable)
    found = combine_adapters(
        adapters,
        output,
        run,
        base=None if run.base is None else base_folder(run.base),
        allow_other_base=run.allow_other_base,
        record={"command": call.command},
    )
    for said in found.notes:
        note(f"note: {said}")
    names = [f"{one['weight']:g} x {one['name']}" for one in found.adapters]
    told: list[Table | str] = [
        _layers(f"{found.kind} of {', '.join(names)}", found.layers),
        _lost(found.relative_error, "of the norm of what was asked for"),
        f"adapter in {output}",
    ]
    return Report(found.as_dict(), told)


def extract(call: Call) -> Report:
    """An adapter made of two checkpoints, the error of each layer, and what else differs."""
    run = call.settings.build("extract", ExtractRun)
    base, tuned, output = call.places
    require_output(Path(output), overwrite=run.overwrite, ours=replaceable)
    with progress("layers") as advance:
        found = extract_adapter(
            base_folder(base),
            base_folder(tuned),
            output,
            run,
            record={"command": call.command},
            progress=advance,
        )
    told: list[Table | str] = [
        _layers("the change of each target", found.layers),
        _lost(found.relative_error, "of the norm of the targets' change"),
    ]
    if found.unchanged:
        told.append(f"{len(found.unchanged)} targets are equal in both and get no update")
    told += _others(found.others)
    if found.unknown:
        told.append(f"the model has no place for these, not looked at: {', '.join(found.unknown)}")
    told.append(f"adapter in {output}")
    return Report(found.as_dict(), told)


def _layers(title: str, layers: list[dict[str, Any]]) -> Table:
    rows = [[one["name"], one["r"], one["norm"], one["error"]] for one in layers]
    return Table(title, _COLUMNS, rows)


def _lost(share: float, of_what: str) -> str:
    return (
        "nothing is lost" if share == 0 else f"error over all layers: {100 * share:.3g} % {of_what}"
    )


def _others(others: list[dict[str, Any]]) -> list[Table | str]:
    """What differs and is no target."""
    if not others:
        return []
    rows = [[one["name"], one["change"], one["norm"], _fate(one)] for one in others]
    left = sum(not one["saved"] for one in others)
    told: list[Table | str] = [
        Table("no targets, and they differ", ["tensor", "change", "norm", ""], rows)
    ]
    if left:
        told.append(f"{left} of them are not in the adapter; --whole saves what can be saved whole")
    return told


def _fate(one: Mapping[str, Any]) -> str:
    where = f"only in the {one['only_in']}, " if one["only_in"] else ""
    return where + ("saved whole" if one["saved"] else "left out")
