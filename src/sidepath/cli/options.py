"""Command-line flags made from frozen dataclasses (floor 7).

A section is one dataclass: its fields are flags (here) and the keys of one TOML table
(`settings`). Each field's docstring is its help.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from sidepath import config
from sidepath.errors import ConfigError, meant

Sections = Mapping[str, type]


@dataclass(frozen=True)
class Flag:
    """One field of one section as a flag."""

    section: str
    field: str
    name: str
    hint: Any
    default: Any
    doc: str
    splits: bool

    @property
    def needed(self) -> bool:
        """Whether the field has no default."""
        return self.default is dataclasses.MISSING

    @property
    def kind(self) -> Any:
        """The annotation without `| None`."""
        return _without_none(self.hint)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `ConfigError`s, and which takes lists of numbers for
    values, not flags, also where the first is negative: `--weights -1,0.5`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._negative_number_matcher = re.compile(r"-[0-9.][0-9.,eE+-]*\Z")

    def error(self, message: str) -> NoReturn:
        """Raise argparse's message as ours."""
        raise ConfigError(message.removeprefix("argument "), hint=f"see {self.prog} --help")


def flags_of(sections: Sections) -> list[Flag]:
    """Every field of the sections as a flag, in order.

    A name that an earlier section took gets its section in front: `--lora-dtype`. A field that
    would be a word of Python's ends with an underscore, its flag does not.
    """
    flags: list[Flag] = []
    taken: set[str] = set()
    for section, cls in sections.items():
        hints, docs = config.field_types(cls), config.field_docs(cls)
        for field in dataclasses.fields(cls):
            name = field.name if field.name not in taken else f"{section}_{field.name}"
            taken.add(name)
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            flags.append(
                Flag(
                    section,
                    field.name,
                    "--" + name.rstrip("_").replace("_", "-"),
                    hints[field.name],
                    default,
                    docs.get(field.name, ""),
                    bool(field.metadata.get("splits", True)),
                )
            )
    return flags


def add_flags(parser: argparse.ArgumentParser, flags: Sequence[Flag]) -> None:
    """Declare each flag; one that is not given leaves nothing behind."""
    groups: dict[str, Any] = {}
    for flag in flags:
        group = groups.setdefault(flag.section, parser.add_argument_group(f"[{flag.section}]"))
        common: dict[str, Any] = {
            "dest": f"{flag.section}.{flag.field}",
            "default": argparse.SUPPRESS,
            "help": _help(flag),
        }
        if flag.kind is bool:
            group.add_argument(flag.name, action=argparse.BooleanOptionalAction, **common)
        else:
            many = _is_tuple(flag.kind) or _is_table(flag.kind)
            action = "append" if many else "store"
            group.add_argument(flag.name, action=action, metavar=_metavar(flag.kind), **common)


def _help(flag: Flag) -> str:
    note = "needed" if flag.needed else f"default: {shown(flag.default)}"
    return f"{flag.doc} ({note})".strip().replace("%", "%%")


def shown(value: Any) -> str:
    """A value as it is typed after a flag."""
    if isinstance(value, Mapping):
        return ",".join(f"{key}={shown(item)}" for key, item in value.items()) or "empty"
    if isinstance(value, (tuple, list)):
        return ",".join(str(item) for item in value) or "empty"
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return kinds[0] if len(kinds) == 1 else typing.Union[tuple(kinds)]  # noqa: UP007
    return hint


def _is_tuple(kind: Any) -> bool:
    return typing.get_origin(kind) is tuple


def _is_table(kind: Any) -> bool:
    origin = typing.get_origin(kind)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(str(arg) for arg in typing.get_args(kind)) + "}"
    if _is_table(kind):
        return "KEY=VALUE"
    if _is_tuple(kind):
        return _metavar(typing.get_args(kind)[0])
    names = {int: "INTEGER", float: "NUMBER", str: "TEXT"}
    return names.get(kind, "VALUE")


def parse_value(flag: Flag, given: str | bool | Sequence[str]) -> Any:
    """What the user typed as the field's value; `none` clears a field that may be nothing."""
    if isinstance(given, bool):
        return given
    optional = flag.kind != flag.hint
    texts = [given] if isinstance(given, str) else list(given)
    if optional and [text.lower() for text in texts] == ["none"]:
        return None
    if _is_table(flag.kind):
        pairs = [_parse_pair(flag, text) for text in texts]
        keys = [key for key, _ in pairs]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ConfigError(f"{flag.name}: given twice", found=", ".join(twice))
        return dict(pairs)
    if _is_tuple(flag.kind):
        item_kind = typing.get_args(flag.kind)[0]
        items = [item for text in texts for item in (_split(text) if flag.splits else [text])]
        return tuple(_parse_one(flag, item, item_kind) for item in items)
    return _parse_one(flag, texts[0], flag.kind)


def _split(text: str) -> list[str]:
    """`a,b` is two items; a comma behind a colon belongs to its item, as in `c_attn:q,v`."""
    head, colon, tail = text.partition(":")
    items = [item.strip() for item in head.split(",")]
    return [*items[:-1], items[-1] + colon + tail.strip()]


def _parse_pair(flag: Flag, text: str) -> tuple[str, Any]:
    key, equals, value = text.rpartition("=")
    if not equals or not key:
        raise ConfigError(f"{flag.name} needs KEY=VALUE", found=repr(text))
    return key, _parse_one(flag, value, typing.get_args(flag.kind)[1])


def _parse_one(flag: Flag, text: str, kind: Any) -> Any:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        for arg in typing.get_args(kind):
            try:
                return _parse_one(flag, text, arg)
            except ConfigError:
                continue
    elif _is_tuple(kind):
        return tuple(_parse_one(flag, item, typing.get_args(kind)[0]) for item in text.split(","))
    elif typing.get_origin(kind) is Literal:
        by_text = {str(arg): arg for arg in typing.get_args(kind)}
        if text in by_text:
            return by_text[text]
    else:
        try:
            return kind(text)
        except ValueError:
            pass
    known = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    raise ConfigError(
        f"{flag.name}: not a value it takes",
        found=repr(text),
        expected=config.type_name(kind),
        hint=meant(text, map(str, known)),
    )
