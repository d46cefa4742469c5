"""Writes that are killed: SIGKILL at moments spread over the whole of each kind of write.

Each row: a kind of write, the kills that struck a living process, after how many the old output
stood and after how many the new one, how many left a mixture, and how many orphans there were after
the next write. The writes are `tests.writes.WRITES`; the outputs are small, so that most of a
write is file operations.

    OMP_NUM_THREADS=1 python benchmarks/killed_writes.py [--kills 200]
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from common import ROOT, machine, markdown, show

sys.path.insert(0, str(ROOT))

from tests.faults import ended, started
from tests.writes import WRITES, Target, sources

HEAD = ("kind of write", "kills", "old there", "new there", "mixtures", "orphans")


@dataclass
class Row:
    """What the kills of one kind of write left."""

    kind: str
    kills: int = 0
    old: int = 0
    new: int = 0
    mixtures: int = 0
    orphans: int = 0
    """After the next write."""


def killed(target: Target, kills: int) -> Row:
    """Kill one write after the other, a little later each time, and begin again at the end."""
    row = Row(target.kind)
    began = time.perf_counter()
    assert ended(started(lambda: target.write("new"))) == 0
    whole = time.perf_counter() - began
    target.write("old")
    tries = 0
    while row.kills < kills:
        child = started(lambda: target.write("new"))
        time.sleep(whole * (tries % kills) / kills)
        tries += 1
        os.kill(child, signal.SIGKILL)
        struck = ended(child) == -signal.SIGKILL
        try:
            state = target.state()
            row.old += struck and state == "old"
            row.new += struck and state == "new"
            row.mixtures += state is None
        except AssertionError:
            row.mixtures += 1
        row.kills += struck
        target.write("old")
        row.orphans += len(target.orphans())
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill every kind of write; 1 when there was a mixture or an orphan."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs, over all kinds")
    chosen = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "sources").mkdir()
        given = sources(place / "sources")
        for number, kind in enumerate(WRITES):
            share = chosen.kills // len(WRITES) + (number < chosen.kills % len(WRITES))
            tempfile.tempdir = str(place / str(number))  # what is left there is an orphan too
            rows.append(killed(Target(kind, given, place / str(number)), share))
            tempfile.tempdir = None
            print(rows[-1], file=sys.stderr, flush=True)
    total = Row("all")
    for row in rows:
        for name in ("kills", "old", "new", "mixtures", "orphans"):
            setattr(total, name, getattr(total, name) + getattr(row, name))
    document = {"machine": machine(), "rows": [asdict(row) for row in rows]}
    show(document, markdown(HEAD, [list(asdict(row).values()) for row in (*rows, total)]))
    return int(total.mixtures + total.orphans > 0)


if __name__ == "__main__":
    sys.exit(main())
