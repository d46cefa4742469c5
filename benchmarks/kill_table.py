"""The kill table: runs that are killed, or whose disk fails, everywhere, and are resumed.

Each row: how a run was stopped, at how many places it really was, how many later starts took up a
checkpoint and reached a step, how many had to fall back to an older one, and how many of the runs
that came to their end have the unbroken run's loss bytes and SHA-256 of the final weights. The
settings are `tests.training.killing.SETTINGS`; every kind is run with each of them, in one process
and in two joined ones. Rows are printed as they come.

    python benchmarks/kill_table.py [--kills 100] [--pair-kills 20] [--setting NAME ...]
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")

from common import ROOT, machine, markdown, show

sys.path.insert(0, str(ROOT))

from tests.training import kill_joined, kill_kinds, kill_signals
from tests.training.killing import SETTINGS, Row

HEAD = (
    *("how it is stopped", "setting", "kill points", "resumes", "fallbacks", "runs"),
    *("bit-equal", "exceptions"),
)


def line(row: Row) -> list[object]:
    """A row of the table."""
    places = ", ".join(f"{count} in {place}" for place, count in sorted(row.places.items()))
    points = f"{row.kills} ({places})" if places else row.kills
    counts = [row.resumes, row.fallbacks, row.runs, row.equal, len(row.exceptions)]
    return [row.kind, row.setting, points, *counts]


def rows_of(setting: str, kills: int, pair_kills: int) -> Iterator[Row]:
    """Every kind of stop, one after the other."""
    yield from kill_joined.whole(pair_kills, setting)
    yield from kill_signals.whole(kills, pair_kills, setting)
    yield from kill_kinds.whole(kills, setting)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all kinds; 1 when a run was not equal or an exception was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="signals at random moments")
    parser.add_argument("--pair-kills", type=int, default=20, help="the same, to two processes")
    parser.add_argument("--setting", action="append", choices=list(SETTINGS), default=None)
    chosen = parser.parse_args(arguments)
    rows, seconds = [], []
    for name in chosen.setting or SETTINGS:
        began = time.perf_counter()
        for row in rows_of(name, chosen.kills, chosen.pair_kills):
            rows.append(row)
            seconds.append(round(time.perf_counter() - began, 1))
            began = time.perf_counter()
            print(f"{seconds[-1]} s: {line(row)} {row.exceptions}", file=sys.stderr, flush=True)
    documents = [
        {**dataclasses.asdict(row), "seconds": spent}
        for row, spent in zip(rows, seconds, strict=True)
    ]
    document = {"machine": machine(), "seconds": round(sum(seconds), 1), "rows": documents}
    show(document, markdown(HEAD, [line(row) for row in rows]))
    return int(any(row.exceptions or row.equal != row.runs for row in rows))


if __name__ == "__main__":
    sys.exit(main())
