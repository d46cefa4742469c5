"""Hold the coverage of `src` against its gate: 95 % of the lines; branches are told beside it.

coverage json && python scripts/coverage_gate.py coverage.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

GATE = 95.0


def verdict(totals: Mapping[str, int]) -> tuple[bool, str]:
    """Whether the gate is passed, and the line that says so, of the totals of `coverage json`."""
    lines = 100.0 * totals["covered_lines"] / totals["num_statements"]
    branches = 100.0 * totals["covered_branches"] / totals["num_branches"]
    told = f"lines {lines:.2f} % (gate {GATE:g} %), branches {branches:.2f} %"
    return lines >= GATE, told


if __name__ == "__main__":
    passed, said = verdict(json.loads(Path(sys.argv[1]).read_text())["totals"])
    print(said)
    sys.exit(not passed)
