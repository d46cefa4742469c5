"""The effective settings of one command: default, then TOML file, then flag (floor 7).

The last one that says something wins, and where each value came from is kept.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from sidepath import config
from sidepath.cli.options import Sections, flags_of
from sidepath.errors import ConfigError, guessed

T = TypeVar("T")
LARGEST = 2**20
"""Bytes of the largest settings file."""
Source = Literal["default", "file", "flag"]


def read_tables(path: str) -> dict[str, Any]:
    """A TOML file as it stands. Errors: `ConfigError` when it is not TOML; any OSError."""
    size = Path(path).stat().st_size
    if size > LARGEST:
        raise ConfigError(
            "the settings file is too large", where=path, found=size, expected=f"at most {LARGEST}"
        )
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    # An integer of 5,000 digits is a ValueError.
    except (ValueError, RecursionError) as error:
        raise ConfigError("the settings file is not TOML", where=path, found=error) from error


def read_file(path: str, sections: Sections, elsewhere: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The tables of a TOML file that belong to these sections.

    Tables named in `elsewhere` belong to other commands and are left out; any other table,
    any unknown key and any key outside a table is a fault, all of them named at once.
    """
    values, faults = known_tables(read_tables(path), sections, elsewhere)
    if faults:
        raise ConfigError("the settings file has unknown settings", where=path, faults=faults)
    return values


def known_tables(
    tables: Mapping[str, Any], sections: Sections, elsewhere: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The tables that belong to these sections, and the faults of all: see `read_file`."""
    faults: list[str] = []
    values: dict[str, dict[str, Any]] = {}
    for table, content in tables.items():
        if not isinstance(content, dict):
            outside = f'"{table}" stands outside a table'
            faults.append(guessed(outside, table, _keys(sections)))
        elif table in sections:
            values[table] = content
            known = list(config.field_types(sections[table]))
            unknown = [key for key in content if key not in known]
            faults += [guessed(f'[{table}] has no field "{key}"', key, known) for key in unknown]
        elif table not in elsewhere:
            faults.append(guessed(f"no table [{table}] here", table, [*sections, *elsewhere]))
    return values, faults


def _keys(sections: Sections) -> list[str]:
    return [name for cls in sections.values() for name in config.field_types(cls)]


class Settings:
    """Each effective value of one command, and where it came from."""

    def __init__(
        self,
        sections: Sections,
        from_file: Mapping[str, Mapping[str, Any]],
        from_flags: Mapping[tuple[str, str], Any],
        file: str | None,
    ) -> None:
        self.file = file
        self.sections = dict(sections)
        self.values: dict[str, dict[str, tuple[Any, Source]]] = {name: {} for name in sections}
        for flag in flags_of(sections):
            key = (flag.section, flag.field)
            in_file = from_file.get(flag.section, {})
            if key in from_flags:
                found: tuple[Any, Source] = (from_flags[key], "flag")
            elif flag.field in in_file:
                cleared = flag.kind != flag.hint and in_file[flag.field] == "none"
                found = (None if cleared else in_file[flag.field], "file")
            else:
                found = (flag.default, "default")
            self.values[flag.section][flag.field] = found

    def change_places(self, change: Callable[[str, str], str]) -> None:
        """Put `change(kind, place)` for each place that a field names by its metadata. In place."""
        for section, cls in self.sections.items():
            for field in dataclasses.fields(cls):
                kind = field.metadata.get("place")
                value, source = self.values[section][field.name]
                if kind is None or not isinstance(value, (str, Mapping)):
                    continue
                if isinstance(value, str):
                    value = change(kind, value)
                else:
                    value = {name: change(kind, str(place)) for name, place in value.items()}
                self.values[section][field.name] = (value, source)

    def given(self, section: str, source: Source) -> dict[str, Any]:
        """The section's values that come from there."""
        fields = self.values[section].items()
        return {name: value for name, (value, where) in fields if where == source}

    def missing(self, section: str) -> list[str]:
        """The section's fields that need a value and have none."""
        fields = self.values[section].items()
        return [name for name, (value, _) in fields if value is dataclasses.MISSING]

    def build(self, section: str, cls: type[T]) -> T:
        """The section's dataclass; a value that is needed and missing is an error."""
        missing = ["--" + name.replace("_", "-") for name in self.missing(section)]
        if missing:
            raise ConfigError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} needed")
        values = {name: value for name, (value, _) in self.values[section].items()}
        try:
            return config.build(cls, values)
        except ConfigError as error:
            blamed = [fault.partition(" = ")[0] for fault in error.faults]
            if not any(self.values[section].get(name, ("", ""))[1] == "file" for name in blamed):
                raise
            where = f"{self.file}, [{section}]"
            raise ConfigError(error.what, where=where, faults=error.faults) from error

    def as_dict(self) -> dict[str, dict[str, dict[str, Any]]]:
        """{section: {field: {value, source}}}; a needed value that is missing is null."""
        return {
            section: {
                name: {"value": _plain(value), "source": source}
                for name, (value, source) in fields.items()
            }
            for section, fields in self.values.items()
        }


def _plain(value: Any) -> Any:
    if value is dataclasses.MISSING:
        return None
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


def toml(settings: Settings) -> str:
    """The settings as TOML that `--config` reads back; each line says where its value is from."""
    lines: list[str] = []
    for section, fields in settings.values.items():
        lines += ["", f"[{section}]"] if lines else [f"[{section}]"]
        for name, (value, source) in fields.items():
            if value is dataclasses.MISSING:
                lines.append(f"# {name} is needed and not set")
            else:
                lines.append(f"{name} = {_toml_value(value)}  # {source}")
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, Mapping):
        inside = ", ".join(
            f"{_toml_text(key)} = {_toml_value(item)}" for key, item in value.items()
        )
        return "{ " + inside + " }" if inside else "{}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, str):
        return _toml_text(value)
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _toml_text(text: str) -> str:
    # JSON's escapes are TOML's for every character but DEL, which JSON leaves bare.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
