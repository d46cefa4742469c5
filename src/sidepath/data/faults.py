"""What is wrong with the rows of a source: the first faults by line, and how many there are."""

from __future__ import annotations

from collections.abc import Iterable

KEPT = 20
"""Lines of faults in one error; with more faults the last line counts the rest."""


class Faults:
    """Faults of one source; a file with a million broken rows costs no more memory than one."""

    def __init__(self) -> None:
        self.count = 0
        self._kept: list[tuple[int, str]] = []

    def __bool__(self) -> bool:
        return self.count > 0

    @property
    def full(self) -> bool:
        """Another fault would only be counted (unless it is of an earlier line)."""
        return self.count > KEPT

    @property
    def kept(self) -> list[tuple[int, str]]:
        """(line, text) of the first `KEPT` faults, by line."""
        self._cut()
        return list(self._kept)

    def add(self, line: int, text: str) -> None:
        """Note what is wrong on a line."""
        self.count += 1
        self._kept.append((line, text))
        if len(self._kept) >= 4 * KEPT:
            self._cut()

    def merge(self, other: Faults) -> None:
        """Add another's faults to these."""
        self.count += other.count
        self._kept += other.kept
        self._cut()

    def _cut(self) -> None:
        self._kept = sorted(self._kept, key=lambda fault: fault[0])[:KEPT]


def lines_of(faulty: Iterable[tuple[str, Faults]]) -> list[str]:
    """Faults as an error lists them, at most `KEPT` lines; each pair gives what stands in
    front of the line number ("line", or "a.jsonl, line") and the faults.
    """
    pairs = list(faulty)
    count = sum(faults.count for _, faults in pairs)
    shown = [f"{where} {line}: {text}" for where, faults in pairs for line, text in faults.kept]
    if count <= KEPT:
        return shown
    return [*shown[: KEPT - 1], f"and {count - KEPT + 1:,} more faults"]
