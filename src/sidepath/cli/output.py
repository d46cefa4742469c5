"""What a command prints: one result on standard output, everything else on standard error."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

SECONDS_BETWEEN_LINES = 5.0


class Advance(Protocol):
    """Says how far the work is: units done, units in all, and facts such as the loss."""

    def __call__(self, done: int, total: int, facts: str = "") -> None: ...


@dataclass(frozen=True)
class Table:
    """A small table: column names and rows of cells."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class Report:
    """A command's result: the JSON document, and the same for people."""

    document: Mapping[str, Any]
    parts: Sequence[Table | str] = field(default_factory=tuple)


def speaks() -> bool:
    """Whether this process speaks to the user: of those torchrun starts, the first one does."""
    return os.environ.get("RANK", "0") == "0"


def note(text: str) -> None:
    """A line for people, on standard error, from the process that speaks."""
    if speaks():
        print(text, file=sys.stderr, flush=True)


def show(report: Report, *, as_json: bool) -> None:
    """Print a report on standard output: JSON, rich tables on a terminal, or plain columns."""
    if not speaks():
        return
    if as_json:
        print(json.dumps(finite(report.document), indent=2, ensure_ascii=False), flush=True)
        return
    terminal = sys.stdout.isatty()
    for part in report.parts:
        if isinstance(part, str):
            print(part)
        elif terminal:
            _rich_table(part)
        else:
            print(plain_table(part))
    sys.stdout.flush()


def finite(value: Any) -> Any:
    """The value with NaN and infinities as null: JSON knows neither."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cell(value: object) -> str:
    """One cell as text: numbers short, nothing as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    # A row is one line, in a pipe too.
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("\n", "⏎")


def plain_table(table: Table) -> str:
    """The table in columns parted by two spaces, without any drawing."""
    lines = [list(table.columns), *[[cell(value) for value in row] for row in table.rows]]
    widths = [max(len(line[index]) for line in lines) for index in range(len(table.columns))]
    body = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([table.title, *body] if table.title else body)


def _rich_table(table: Table) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(title=table.title or None, title_justify="left")
    for column in table.columns:
        drawn.add_column(column, overflow="fold")
    for row in table.rows:
        drawn.add_row(*[Text(cell(value)) for value in row])
    Console(file=sys.stdout).print(drawn)


@contextmanager
def progress(what: str) -> Iterator[Advance]:
    """A bar with the time left on a terminal, else a line now and then; on standard error."""
    if sys.stderr.isatty() and speaks():
        with _bar(what) as advance:
            yield advance
    else:
        yield _lines(what)


@contextmanager
def _bar(what: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    # The bar's console takes over standard error, so that notes appear above the bar.
    with Progress(*columns, console=Console(file=sys.stderr), redirect_stdout=False) as bar:
        task = bar.add_task(what, total=None, facts="")
        yield lambda done, total, facts="": bar.update(
            task, completed=done, total=total, facts=facts
        )


def _lines(what: str) -> Advance:
    began = time.monotonic()
    last = began - SECONDS_BETWEEN_LINES

    def advance(done: int, total: int, facts: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if done != total and now - last < SECONDS_BETWEEN_LINES:
            return
        last = now
        left = f"{(now - began) / done * (total - done):.0f} s left" if 0 < done < total else ""
        note(", ".join(part for part in (f"{what} {done}/{total}", facts, left) if part))

    return advance
