"""The verb compare: methods on one data set, at equal budget (floor 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from sidepath.cli.bases import (
    base_folder,
    context_tokens,
    device_of,
    load_causal,
    load_classifier,
    load_tokenizer,
)
from sidepath.cli.compare_run import CompareRun
from sidepath.cli.folders import require_place
from sidepath.cli.output import Report, Table, note, progress
from sidepath.cli.runs import Dtype, Quantise
from sidepath.cli.settings import Settings, known_tables, read_tables
from sidepath.cli.surface import Call, other_tables
from sidepath.compare.dimension import Search, run_search
from sidepath.compare.entrants import Entrant, entrants_of
from sidepath.compare.latency import shapes_of
from sidepath.compare.material import DEMO
from sidepath.compare.presets import PRESETS, SHAPES
from sidepath.compare.report import (
    HEAD,
    notes,
    sections,
    table_rows,
)
from sidepath.compare.run import Comparison, run_comparison
from sidepath.compare.setting import Setting
from sidepath.compare.workers import Workers
from sidepath.config import TrainConfig
from sidepath.errors import ConfigError
from sidepath.page import PICTURE_MISSING, has_matplotlib
from sidepath.store.configs import quiet
from sidepath.store.fingerprint import fingerprint
from sidepath.store.hub import PREFIX

T = TypeVar("T")
FIXED = (
    "learning_rate",
    "seed",
    "eval_share",
    "eval_every",
    "patience",
    "checkpoint_every",
    "keep_checkpoints",
    "watch",
)
"""Settings of the training loop that a comparison decides itself."""

_UNUSED: Mapping[bool, Mapping[str, str]] = {
    True: dict.fromkeys(
        ("latency", "rounds"), "--intrinsic times nothing: what it trains folds in"
    ),
    False: dict.fromkeys(("share", "dimensions", "subspace"), "only --intrinsic reads it"),
}
"""Settings that a search, or anything but a search, would ignore; and why."""


@dataclass(frozen=True)
class FolderBases:
    """Fresh bases from a transformers folder."""

    folder: Path
    dtype: Dtype
    device: str
    quantise: Quantise

    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return load_tokenizer(self.folder)

    def causal(self) -> nn.Module:
        """The base as a causal language model."""
        return load_causal(self.folder, self.dtype, self.device, self.quantise)

    def classifier(self, labels: Sequence[str], pad_id: int) -> tuple[nn.Module, tuple[str, ...]]:
        """The base with a classification head, and the modules no checkpoint filled."""
        options = (self.dtype, self.device, self.quantise)
        return load_classifier(self.folder, labels, pad_id, *options)

    def context(self) -> int | None:
        """Most tokens of a row."""
        return context_tokens(self.folder)

    def identity(self) -> str:
        """The fingerprint of the weights, and how they are loaded."""
        device = device_of(self.device).type
        return f"{fingerprint(self.folder).id} {self.dtype} {self.quantise} {device}"


def compare(call: Call) -> Report:
    """Every entrant of a settings file or a preset, on one data set; or a search in dimensions."""
    run, train, entrants = _read(call)
    quiet()
    output = Path(run.output)
    require_place(output)
    bases = FolderBases(base_folder(run.base), run.dtype, run.device, run.quantise)
    setting = _setting(run, train, bases)
    workers = Workers(run.workers, run.through)
    if run.intrinsic:
        (full,) = entrants
        search = Search(setting, full, output, workers, run.subspace, run.share, run.dimensions)
        return _report(run_search(search, progress=progress, say=note))
    if run.preset != "none":
        tables = PRESETS[run.preset](bases.causal())
        entrants, faults = entrants_of(tables, run.learning_rates)
        _require(faults, f"--preset {run.preset}")
    timing_only = run.preset == "latency"
    shapes = shapes_of(SHAPES if timing_only else run.latency or ())
    comparison = Comparison(
        setting, entrants, output, workers, shapes, run.rounds, train=not timing_only
    )
    return _report(run_comparison(comparison, progress=progress, say=note))


def _read(call: Call) -> tuple[CompareRun, TrainConfig, list[Entrant]]:
    """The settings, from flags and the file; everything that is wrong with them in one error."""
    file = call.places[0] if call.places else None
    tables = {} if file is None else read_tables(file)
    methods = tables.pop("method", [])
    sections = call.settings.sections
    from_file, faults = known_tables(tables, sections, other_tables(sections))
    _several_seeds(from_file.get("compare", {}))
    flags = {
        (section, name): value
        for section in sections
        for name, value in call.settings.given(section, "flag").items()
    }
    settings = Settings(sections, from_file, flags, file)
    run = _built(settings, "compare", CompareRun, faults)
    train = _built(settings, "train", TrainConfig, faults)
    faults += [
        f"[train] {name}: compare decides it itself"
        for name in FIXED
        if settings.values["train"][name][1] != "default"
    ]
    rates = (1.0,) if run is None else run.learning_rates
    listed = isinstance(methods, list) and all(isinstance(one, dict) for one in methods)
    faults += [] if listed else ["method: expected tables [[method]]"]
    if run is not None:
        faults += _what_does_not_go_together(run, settings, methods)
        methods = [{"name": "full"}] if run.intrinsic and not methods else methods
    entrants, wrong = entrants_of(methods if listed else [], rates)
    _require([*faults, *wrong], file)
    assert run is not None
    assert train is not None
    return run, train, entrants


def _what_does_not_go_together(run: CompareRun, settings: Settings, methods: Any) -> list[str]:
    faults = []
    if sum((bool(methods), run.preset != "none", run.intrinsic)) != 1:
        faults.append("entrants: give one of [[method]] tables, --preset and --intrinsic")
    given = {name for name, (_, where) in settings.values["compare"].items() if where != "default"}
    return faults + [
        f"[compare] {name}: {why}" for name, why in _UNUSED[run.intrinsic].items() if name in given
    ]


def _several_seeds(table: dict[str, Any]) -> None:
    """A number of seeds may stand without brackets. In place."""
    seeds = table.get("seeds")
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        table["seeds"] = [seeds]


def _built(settings: Settings, section: str, cls: type[T], faults: list[str]) -> T | None:
    try:
        return settings.build(section, cls)
    except ConfigError as error:
        faults += [f"[{section}] {one}" for one in error.faults or [error.what]]
        return None


def _require(faults: Sequence[str], where: object) -> None:
    if faults:
        raise ConfigError("the comparison cannot be set up", where=where, faults=faults)


def _setting(run: CompareRun, train: TrainConfig, bases: FolderBases) -> Setting:
    data, test = run.data, run.eval_data
    missing = [place for place in (data, test) if place is not None and not _is_there(place)]
    if missing and run.otherwise is not None:
        note(f"{', '.join(missing)}: not there; comparing on {run.otherwise} instead")
        data, test = run.otherwise, None
    return Setting(
        bases=bases,
        data=data,
        eval_data=test,
        train=train,
        seeds=run.all_seeds,
        metric=run.metric,
        columns=tuple(sorted(run.columns.items())),
        limit=run.limit,
        eval_limit=run.eval_limit,
        validation=run.validation,
        max_tokens=run.max_tokens,
        max_new_tokens=run.max_new_tokens,
    )


def _is_there(place: str) -> bool:
    return place.startswith((DEMO, PREFIX)) or Path(place).exists()


def _report(document: Mapping[str, Any]) -> Report:
    """The result of `sidepath compare`."""
    told: list[str | Table] = []
    if any(row["metric"] for row in document["rows"]):
        title = f"{document['metric']} on {document['data']['test']:,} rows"
        told += [Table(title, HEAD, table_rows(document)), ""]
    for title, head, rows in sections(document):
        told += [Table(title, head, rows), ""]
    told += [*notes(document), f"in {document['output']}: {', '.join(document['files'])}"]
    if not has_matplotlib():
        told.append(PICTURE_MISSING)
    return Report(document, told)
