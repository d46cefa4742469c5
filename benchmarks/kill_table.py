"""The kill table: runs that are killed, or whose disk fails, everywhere, and are resumed.

Each row: how a run was stopped, at how many places it really was, how many later starts took up a
checkpoint and reached a step, how many had to fall back to an older one, and how many of the runs
that came to their end have the unbroken run's loss bytes and SHA-256 of the final weights. The
settings are `tests.training.killing.SETTINGS`; every kind is run with each of them.

    python benchmarks/kill_table.py [--kills 100] [--setting NAME ...]
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")

from common import ROOT, machine, markdown, show

sys.path.insert(0, str(ROOT))

from tests.training.kill_kinds import whole
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all kinds; 1 when a run was not equal or an exception was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs at random moments")
    parser.add_argument("--setting", action="append", choices=list(SETTINGS), default=None)
    chosen = parser.parse_args(arguments)
    rows = [row for name in chosen.setting or SETTINGS for row in whole(chosen.kills, name)]
    document = {"machine": machine(), "rows": [dataclasses.asdict(row) for row in rows]}
    show(document, markdown(HEAD, [line(row) for row in rows]))
    return int(any(row.exceptions or row.equal != row.runs for row in rows))


if __name__ == "__main__":
    sys.exit(main())
