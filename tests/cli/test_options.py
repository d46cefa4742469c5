"""Flags from dataclasses: types, help, and what a user typed as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from sidepath.cli.options import Flag, flags_of, parse_value, shown
from sidepath.errors import ConfigError


@dataclass(frozen=True)
class Sample:
    count: int = 3
    """How many."""
    share: float = 0.5
    """Which share."""
    limit: int | None = None
    """At most."""
    names: tuple[str, ...] = ("a",)
    """Which."""
    blocks: tuple[int, ...] | None = None
    """Which blocks."""
    exact: tuple[str, ...] = field(default=(), metadata={"splits": False})
    """As typed."""
    table: Mapping[str, int] = field(default_factory=dict)
    """By name."""
    kind: Literal["one", "two"] = "one"
    """Which kind."""


@dataclass(frozen=True)
class Second:
    kind: int
    """Another kind."""


def flag(name: str) -> Flag:
    return next(flag for flag in flags_of({"s": Sample}) if flag.field == name)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("count", "7", 7),
        ("share", "1e-3", 0.001),
        ("limit", "5", 5),
        ("limit", "none", None),
        ("names", ["q_proj,v_proj"], ("q_proj", "v_proj")),
        ("names", ["q_proj", "v_proj"], ("q_proj", "v_proj")),
        ("names", ["q_proj,c_attn:q,v"], ("q_proj", "c_attn:q,v")),
        ("blocks", ["0,2", "5"], (0, 2, 5)),
        ("exact", ["one, two"], ("one, two",)),
        ("table", ["a=1", "b.*=2"], {"a": 1, "b.*": 2}),
        ("kind", "two", "two"),
    ],
)
def test_values(name: str, given: Any, expected: Any) -> None:
    assert parse_value(flag(name), given) == expected


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("count", "3.5"),
        ("share", "much"),
        ("count", "none"),
        ("blocks", ["1,x"]),
        ("table", ["a"]),
        ("table", ["=1"]),
        ("table", ["a=x"]),
        ("kind", "three"),
    ],
)
def test_impossible_values_name_the_flag(name: str, given: Any) -> None:
    with pytest.raises(ConfigError, match=f"--{name}"):
        parse_value(flag(name), given)


def test_a_name_taken_gets_its_section_in_front() -> None:
    names = [flag.name for flag in flags_of({"s": Sample, "other": Second})]
    assert names[-2:] == ["--kind", "--other-kind"]


def test_a_field_without_default_is_needed() -> None:
    (only,) = flags_of({"other": Second})
    assert only.needed
    assert not flag("count").needed


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "none"), (True, "on"), ((), "empty"), (("a", "b"), "a,b"), ({"a": 1}, "a=1")],
)
def test_defaults_are_shown_as_they_are_typed(value: Any, text: str) -> None:
    assert shown(value) == text
