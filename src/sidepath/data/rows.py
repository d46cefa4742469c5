"""Rows become texts: which schema the rows have, and whether each row keeps to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sidepath.data.faults import lines_of
from sidepath.data.forms import FORMS
from sidepath.data.sources import Row, Source
from sidepath.errors import DataError, guessed

Schema = Literal["messages", "completion", "classify", "text"]
Task = Literal["auto", "causal", "classify"]

FIELDS: dict[Schema, tuple[str, ...]] = {
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "classify": ("text", "label"),
    "text": ("text",),
}
_SCHEMAS: dict[Task, tuple[Schema, ...]] = {
    "auto": ("messages", "completion", "classify", "text"),
    "causal": ("messages", "completion", "text"),
    "classify": ("classify",),
}
KNOWN = sorted({name for names in (*FIELDS.values(), *FORMS.values()) for name in names})
"""Every field that a schema or a form has a use for."""


def require_columns(source: Source, rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Raise a `DataError` unless `columns` maps known fields to columns that the rows have."""
    wrong = [name for name in columns if name not in KNOWN]
    if wrong:
        raise DataError(
            "columns: unknown field on the left",
            found=", ".join(f'"{name}"' for name in wrong),
            expected=", ".join(KNOWN),
        )
    present = {name for row in rows for name in row.fields}
    absent = [name for name in columns.values() if name not in present]
    if rows and absent:
        faults = [guessed(f'"{name}"', name, present) for name in absent]
        raise DataError(
            "no such column", where=source.name, faults=faults, expected=", ".join(sorted(present))
        )


def renamed(rows: Sequence[Row], columns: Mapping[str, str]) -> list[Row]:
    """Rows whose fields have the names the schemas know: `columns` maps ours to the file's."""
    if not columns:
        return list(rows)
    return [Row(row.line, {**row.fields, **_renamed(row.fields, columns)}) for row in rows]


def _renamed(fields: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    return {ours: fields[theirs] for ours, theirs in columns.items() if theirs in fields}


def schema_of(source: Source, rows: Sequence[Row], task: Task) -> Schema:
    """The schema of the first row that has one; a `DataError` when no row has.

    A row's own fields decide: `messages` before `prompt` and `completion`, before `text` with
    `label` (not for task "causal"), before `text` alone.
    """
    for row in rows:
        for schema in _SCHEMAS[task]:
            if all(name in row.fields for name in FIELDS[schema]):
                return schema
    found = ", ".join(sorted({name for row in rows[:100] for name in row.fields}))
    forms = ["+".join(names[:2]) for names in FORMS.values()] if task != "classify" else []
    raise DataError(
        "the rows have none of the known sets of columns",
        where=source.name,
        found=found or "no columns",
        expected=" | ".join(["+".join(FIELDS[schema]) for schema in _SCHEMAS[task]] + forms),
        hint='name the columns, as in columns={"prompt": "question", "completion": "answer"}',
        faults=lines_of([(source.unit, source.faults)]),
    )


def check_rows(source: Source, rows: Sequence[Row], schema: Schema) -> list[Row]:
    """The rows that fit the schema; every other row becomes a fault of `source`."""
    return [row for row in rows if _fits(source, row, schema)]


def _fits(source: Source, row: Row, schema: Schema) -> bool:
    absent = [name for name in FIELDS[schema] if name not in row.fields]
    if absent:
        other = [
            name for name, fields in FIELDS.items() if all(key in row.fields for key in fields)
        ]
        mixed = f" (a row of kind {other[0]} among rows of kind {schema})" if other else ""
        names = " and ".join(f'"{name}"' for name in absent)
        source.fault(row.line, f"no {names}{mixed}; found {', '.join(row.fields) or 'nothing'}")
        return False
    faults = [
        f'"{name}": {fault}' for name in FIELDS[schema] if (fault := _wrong(name, row.fields[name]))
    ]
    for fault in faults:
        source.fault(row.line, fault)
    return not faults


def _wrong(name: str, value: Any) -> str | None:
    if name == "messages":
        return _wrong_messages(value)
    if name == "label":
        fits = isinstance(value, int) or (isinstance(value, str) and value.strip())
        return None if fits else f"expected a name or an integer, found {value!r:.40}"
    return wrong_text(value)


def wrong_text(value: Any) -> str | None:
    """Why a value is no text that a tokenizer takes; None for one that is."""
    if not isinstance(value, str):
        return f"expected text, found {type(value).__name__}"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "not valid text (bytes that are not UTF-8, or half a surrogate pair)"
    return None


def _wrong_messages(value: Any) -> str | None:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        return f"expected a list of messages, found {value!r:.40}"
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return f'message {number} has no "role"'
        calls = message["role"] == "assistant" and message.get("tool_calls")
        if calls and message.get("content") is None:
            continue
        if fault := wrong_text(message.get("content")):
            return f'message {number}, "content": {fault}'
    if all(message["role"] != "assistant" for message in value):
        return "no message of the assistant: nothing to learn"
    return None
