"""Rows become texts: which schema the rows have, and whether each row keeps to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sidepath.errors import DataError, nearest
from sidepath.training.sources import Row, Source

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


def rename(source: Source, columns: Mapping[str, str] | None) -> None:
    """Give fields the names the schemas know: `columns` maps ours to the file's. In place."""
    if not columns:
        return
    known = sorted({name for names in FIELDS.values() for name in names})
    wrong = [name for name in columns if name not in known]
    if wrong:
        raise DataError(
            "columns: unknown field on the left",
            found=", ".join(f'"{name}"' for name in wrong),
            expected=", ".join(known),
        )
    present = {name for row in source.rows for name in row.fields}
    absent = [name for name in columns.values() if name not in present]
    if source.rows and absent:
        faults = [_no_column(name, present) for name in absent]
        raise DataError(
            "no such column", where=source.name, faults=faults, expected=", ".join(sorted(present))
        )
    source.rows = [
        Row(row.line, {**row.fields, **_renamed(row.fields, columns)}) for row in source.rows
    ]


def _renamed(fields: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    return {ours: fields[theirs] for ours, theirs in columns.items() if theirs in fields}


def _no_column(name: str, present: set[str]) -> str:
    close = nearest(name, present)
    return f'"{name}"' + (f": did you mean {close}?" if close else "")


def schema_of(source: Source, task: Task) -> Schema:
    """The schema of the first row that has one; a `DataError` when no row has.

    A row's own fields decide: `messages` before `prompt` and `completion`, before `text` with
    `label` (not for task "causal"), before `text` alone.
    """
    if not source.rows:
        raise DataError(
            "there are no rows", where=source.name, found="nothing", faults=source.faults
        )
    for row in source.rows:
        for schema in _SCHEMAS[task]:
            if all(name in row.fields for name in FIELDS[schema]):
                return schema
    found = ", ".join(sorted({name for row in source.rows[:100] for name in row.fields}))
    raise DataError(
        "the rows have none of the known sets of columns",
        where=source.name,
        found=found or "no columns",
        expected=" | ".join("+".join(FIELDS[schema]) for schema in _SCHEMAS[task]),
        hint='name the columns, as in columns={"prompt": "question", "completion": "answer"}',
        faults=source.faults,
    )


def check_rows(source: Source, schema: Schema) -> list[Row]:
    """The rows that fit the schema; every other row becomes a fault of `source`."""
    return [row for row in source.rows if _fits(source, row, schema)]


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
        fits = isinstance(value, (str, int)) and value != ""
        return None if fits else f"expected a name or an integer, found {value!r:.40}"
    return _wrong_text(value)


def _wrong_text(value: Any) -> str | None:
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
        if fault := _wrong_text(message.get("content")):
            return f'message {number}, "content": {fault}'
    if all(message["role"] != "assistant" for message in value):
        return "no message of the assistant: nothing to learn"
    return None


def class_ids(
    source: Source, rows: Sequence[Row], labels: Sequence[str] | None
) -> tuple[list[int], tuple[str, ...]]:
    """The class id of each row, and the classes' names by id.

    Given `labels`, the id is the position in it (an integer label is compared as text, or is
    itself the position when no name equals it); other labels become faults of `source`.
    Without `labels`, the classes found are sorted: as numbers when all are, else as text.
    """
    found = [str(row.fields["label"]).strip() for row in rows]
    names = tuple(labels) if labels is not None else _sorted_classes(found)
    ids = {name: at for at, name in enumerate(names)}
    if not any(name in ids for name in found):
        ids = {str(at): at for at in range(len(names))}
    for row, name in zip(rows, found, strict=True):
        if name not in ids:
            source.fault(row.line, f'label "{name}" is out of range: expected {", ".join(ids)}')
    return [ids.get(name, 0) for name in found], names


def _sorted_classes(found: Sequence[str]) -> tuple[str, ...]:
    distinct = set(found)
    if all(name.lstrip("-").isdecimal() for name in distinct):
        return tuple(sorted(distinct, key=int))
    return tuple(sorted(distinct))
