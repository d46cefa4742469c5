"""Who takes part: methods with their settings and learning rates, read from `[[method]]` tables."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sidepath.config import as_dict, build, field_types
from sidepath.errors import ConfigError, meant
from sidepath.methods import METHODS
from sidepath.methods.base import Method

OWN = ("name", "label", "learning_rates", "grid")
"""Keys of a `[[method]]` table that are not the method's own fields."""


@dataclass(frozen=True)
class Entrant:
    """One method with its settings, and the learning rates that are tried for it."""

    label: str
    config: Method
    learning_rates: tuple[float, ...]

    def identity(self) -> dict[str, Any]:
        """The method and its settings as plain values; the label is not among them."""
        return {"method": self.config.method, "settings": as_dict(self.config)}


def entrants_of(
    tables: Sequence[Mapping[str, Any]], learning_rates: Sequence[float]
) -> tuple[list[Entrant], list[str]]:
    """The entrants of some `[[method]]` tables, and everything that is wrong with these.

    A table names its method, gives fields of it, and may give `learning_rates` of its own,
    a `label`, and a `grid`: lists of values of fields, each combination of which takes part.
    """
    found: list[Entrant] = []
    faults: list[str] = []
    for number, table in enumerate(tables, start=1):
        where = f"[[method]] {number}"
        name = table.get("name")
        if not isinstance(name, str) or name not in METHODS:
            hint = meant(str(name), METHODS) or f"expected {', '.join(METHODS)}"
            faults.append(
                f'{where}: unknown method "{name}": {hint}' if name else f"{where} has no name"
            )
            continue
        rates, wrong = _rates(table.get("learning_rates", list(learning_rates)))
        faults += [f"{where} ({name}): {text}" for text in wrong]
        made, wrong = _combinations(METHODS[name], table, tuple(rates))
        faults += [f"{where} ({name}): {text}" for text in wrong]
        found += made
    return found, faults + _unequal(found) + _twice(found)


def _rates(given: Any) -> tuple[list[float], list[str]]:
    numbers = [
        float(one)
        for one in (given if isinstance(given, list) else [])
        if isinstance(one, (int, float)) and not isinstance(one, bool) and 0 < one < float("inf")
    ]
    if not numbers or len(numbers) != len(given) or len(set(numbers)) != len(numbers):
        return [1.0], [f"learning_rates = {given!r}: expected different numbers above 0"]
    return sorted(numbers), []


def _combinations(
    cls: type[Method], table: Mapping[str, Any], rates: tuple[float, ...]
) -> tuple[list[Entrant], list[str]]:
    fields = {key: value for key, value in table.items() if key not in OWN}
    grid = table.get("grid", {})
    label = table.get("label", cls.method)
    faults = [] if isinstance(label, str) and label else [f"label = {label!r}: expected a text"]
    faults += _grid_faults(cls, grid, fields)
    if faults:
        return [], faults
    found: list[Entrant] = []
    for values in itertools.product(*grid.values()):
        varied = dict(zip(grid, values, strict=True))
        told = " ".join(f"{key}={_shown(value)}" for key, value in varied.items())
        try:
            config = build(cls, {**fields, **varied})
        except ConfigError as error:
            faults += [fault for fault in error.faults or [error.what] if fault not in faults]
            continue
        found.append(Entrant(f"{label} {told}".rstrip(), config, rates))
    return found, faults


def _grid_faults(cls: type[Method], grid: Any, fields: Mapping[str, Any]) -> list[str]:
    if not isinstance(grid, dict):
        return [f"grid = {grid!r}: expected a table of lists"]
    known = [name for name in field_types(cls) if name not in fields]
    faults = [f'grid has "{key}", which is no field to vary' for key in grid if key not in known]
    return faults + [
        f"grid.{key} = {values!r}: expected a list of values"
        for key, values in grid.items()
        if not isinstance(values, list) or not values
    ]


def _shown(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _unequal(entrants: Sequence[Entrant]) -> list[str]:
    """A method that tries more rates than the others would have more luck as well."""
    counts = {entrant.label: len(entrant.learning_rates) for entrant in entrants}
    if len(set(counts.values())) < 2:
        return []
    told = ", ".join(f"{label} {count}" for label, count in counts.items())
    return [f"every entrant tries as many learning rates as the others; found {told}"]


def _twice(entrants: Sequence[Entrant]) -> list[str]:
    labels = [entrant.label for entrant in entrants]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    return [f'two entrants are called "{label}": give each a label' for label in twice]
