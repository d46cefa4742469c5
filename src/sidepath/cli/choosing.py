"""An adapter at lower rank, and how much of it is enough (floor 7)."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sidepath.analyse import Factors, Keep, Truncated, truncate
from sidepath.analyse.advise import advise, energy_of_kinds, kind_of
from sidepath.cli.answers import data_for, labels_of, model_for
from sidepath.cli.bases import base_folder
from sidepath.cli.folders import require_output
from sidepath.cli.inspect_run import InspectRun
from sidepath.cli.output import Table, note
from sidepath.errors import ConfigError, StoreError
from sidepath.injection.surgery import remove
from sidepath.store.adapter import load
from sidepath.store.refactored import write_refactored
from sidepath.store.saving import replaceable
from sidepath.training.metrics import LOWER_IS_BETTER

NAME = "inspected"
Told = list[Table | str]


def truncated(
    found: Mapping[str, Factors], place: Path, run: InspectRun
) -> tuple[dict[str, Any], Told]:
    """Write the adapter with fewer directions; what was lost, and with data the metric's change."""
    assert run.truncate is not None
    assert run.output is not None
    _require_folder(place)
    output = Path(run.output)
    require_output(output, overwrite=run.overwrite, ours=replaceable)
    cut = _cut(found, _keep(run.truncate), list(found))
    measure = None if run.data is None else _measure(place, run)
    before = None if measure is None else measure(place)
    write_refactored(place, output, _pairs(cut), {"truncated": run.truncate})
    document: dict[str, Any] = {
        "output": str(output),
        "keep": run.truncate,
        "numbers_before": sum(one.A_RI.numel() + one.B_Or.numel() for one in found.values()),
        "numbers_after": sum(one.A_KI.numel() + one.B_OK.numel() for one in cut.values()),
        "relative_error": _relative(cut),
        "layers": [
            {"name": name, "r": one.r, "error": one.error, "norm": one.norm}
            for name, one in cut.items()
        ],
        "metrics": {},
    }
    rows = [[name, found[name].r, one.r, one.norm, one.error] for name, one in cut.items()]
    told: Told = [Table("at lower rank", ["layer", "r", "now", "norm", "error"], rows)]
    told.append(
        f"{document['numbers_before']:,} numbers became {document['numbers_after']:,} in {output}; "
        f"lost is {100 * document['relative_error']:.2g} % of the norm"
    )
    if measure is not None:
        after = measure(output)
        document["metrics"][measure.name] = {"before": before, "after": after}
        told.append(f"{measure.name} {before:.4g} before, {after:.4g} after")
    return document, told


def advised(
    found: Mapping[str, Factors], place: Path, run: InspectRun
) -> tuple[dict[str, Any], Told]:
    """The smallest rank and the fewest kinds of matrices that keep the metric; written to --output
    where that is given.
    """
    _require_folder(place)
    if run.output is not None:
        require_output(Path(run.output), overwrite=run.overwrite, ours=replaceable)
    measure = _measure(place, run)
    r = max(len(factors.A_RI) for factors in found.values())
    kinds = list(energy_of_kinds(found))

    def cut(rank: int, chosen: Sequence[str]) -> dict[str, Truncated]:
        return _cut(found, Keep(r=rank), [name for name in found if kind_of(name) in chosen])

    def score(rank: int, chosen: Sequence[str]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            value = measure(
                write_refactored(place, Path(folder, NAME), _pairs(cut(rank, chosen)), {})
            )
        note(f"rank {rank} on {', '.join(chosen)}: {measure.name} {value:.4g}")
        return value

    higher = measure.name not in LOWER_IS_BETTER
    advice = advise(
        score, measure(place), r, kinds, tolerance=run.tolerance, higher_is_better=higher
    )
    if run.output is not None:
        said = {"advised": {"rank": advice.rank, "targets": list(advice.kinds)}}
        write_refactored(place, run.output, _pairs(cut(advice.rank, advice.kinds)), said)
    rows = [[one.rank, ", ".join(one.kinds), one.value, one.kept] for one in advice.tried]
    told: Told = [
        Table("smaller adapters tried", ["rank", "targets", measure.name, "kept"], rows),
        f"rank {advice.rank} on {', '.join(advice.kinds)} is enough: {measure.name} "
        f"{advice.value:.4g}, the whole adapter's is {advice.full:.4g}",
    ]
    return {**advice.as_dict(), "metric": measure.name, "output": run.output}, told


class Measure:
    """The metric of an adapter's folder on the run's data; the base is loaded once."""

    def __init__(self, name: str, model: nn.Module, of: Callable[[], float]) -> None:
        self.name = name
        self._model = model
        self._of = of

    def __call__(self, folder: Path) -> float:
        load(self._model, folder, NAME)
        try:
            return self._of()
        finally:
            remove(self._model, NAME)


def _measure(place: Path, run: InspectRun) -> Measure:
    from sidepath.training.evaluate import evaluate

    labels = labels_of(place)
    folder = base_folder(run.base)
    data = data_for(run, folder, labels, place)
    model = model_for(run, folder, data.labels, data.pad_id)
    name = run.metric or ("loss" if labels is None else "accuracy")

    def of() -> float:
        found = evaluate(
            model,
            data,
            metrics=[name],
            batch_size=run.batch_size,
            max_new_tokens=run.max_new_tokens,
        )
        return found[name]

    return Measure(name, model, of)


def _cut(found: Mapping[str, Factors], keep: Keep, names: Sequence[str]) -> dict[str, Truncated]:
    return {name: truncate(found[name], keep) for name in names}


def _pairs(cut: Mapping[str, Truncated]) -> dict[str, tuple[Any, Any]]:
    return {name: (one.A_KI, one.B_OK) for name, one in cut.items()}


def _relative(cut: Mapping[str, Truncated]) -> float:
    whole = math.hypot(*(one.norm for one in cut.values()))
    return math.hypot(*(one.error for one in cut.values())) / whole if whole > 0 else 0.0


def _keep(given: str) -> Keep:
    name, _, value = given.partition("=")
    try:
        if name == "r" and int(value) >= 1:
            return Keep(r=int(value))
        if name == "energy" and 0 < float(value) <= 1:
            return Keep(energy=float(value))
    except ValueError:
        pass
    raise ConfigError(
        "--truncate says nothing to keep",
        found=given,
        expected="r=N with N at least 1, or energy=SHARE with a share above 0 and at most 1",
    )


def _require_folder(place: Path) -> None:
    if place.is_file():
        raise StoreError(
            "a file of loralib is looked at as it is; a smaller adapter is made of a folder",
            where=place,
            hint="load it with sidepath.load_loralib onto its base, and save it",
        )
