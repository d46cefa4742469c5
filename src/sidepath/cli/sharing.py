"""The verbs that share adapters: push, to the hub; library, a folder of them (floor 7)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sidepath.cli.bases import adapter_place, base_folder
from sidepath.cli.output import Report, Table, note
from sidepath.cli.sharing_runs import LibraryRun, PushRun
from sidepath.cli.surface import Call
from sidepath.store.library import Entry, Library
from sidepath.store.plan import readable
from sidepath.store.pushing import push as push_folder


def push(call: Call) -> Report:
    """Upload an adapter's folder, verified before and after, with a model card."""
    run = call.settings.build("push", PushRun)
    folder, target = call.places
    note(f"pushing {folder} to {target}")
    found = push_folder(
        adapter_place(folder),
        target,
        private=run.private,
        message=run.message,
        licence=run.licence,
        parity=None if run.parity is None else Path(run.parity),
    )
    rows = [[name, size] for name, size in found.files.items()]
    document = {"place": str(found.place), "url": found.url, "files": dict(found.files)}
    said = f"{found.place} holds what was sent: {found.url}"
    return Report(document, [Table("", ["file", "bytes"], rows), said])


def library(call: Call) -> Report:
    """The adapters of a folder; damaged ones are told beside the sound ones."""
    run = call.settings.build("library", LibraryRun)
    found = Library(call.places[0])
    identity = run.base is None or run.base.startswith("sha256:")
    base: Any = run.base if identity else base_folder(run.base)
    entries = found.search(base, method=run.method)
    document = {
        "library": str(found.folder),
        "adapters": [entry.as_dict() for entry in entries],
        "damaged": [one.as_dict() for one in found.damaged],
        "others": found.others,
    }
    columns = ["adapter", "method", "r", "base", "numbers", "size", "metrics"]
    parts: list[Table | str] = [Table("", columns, [_row(entry) for entry in entries])]
    if found.damaged:
        rows = [[one.name, one.fault] for one in found.damaged]
        parts += ["", Table("damaged", ["folder", "fault"], rows)]
    if found.others:
        parts.append(f"no adapters: {', '.join(found.others)}")
    parts.append(f"{len(entries):,} of {len(found):,} adapters, {len(found.damaged):,} damaged")
    return Report(document, parts)


def _row(entry: Entry) -> list[object]:
    metrics = ", ".join(
        f"{name} {value:.4g}"
        for name, value in entry.metrics.items()
        if isinstance(value, (int, float))
    )
    name = entry.base if entry.base_revision or entry.base is None else Path(entry.base).name
    base = " ".join(part for part in (name, entry.fingerprint) if part)
    size = readable(entry.size)
    return [entry.name, entry.method, entry.rank, base, entry.numbers, size, metrics]
