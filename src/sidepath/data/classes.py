"""Classes of labelled rows, found while the rows stream by."""

from __future__ import annotations

from collections.abc import Sequence

from sidepath.data.faults import Faults
from sidepath.data.sources import Row, Source
from sidepath.errors import DataError

LARGEST = 65_536
"""Most classes that labels are taken for; more are numbers or texts in the wrong column."""


class Classes:
    """Numbers the labels as they come; `settle` says what their class ids are.

    Given `labels`, a class id is the position in it: a label is compared as text, or is itself
    the position when no label equals a name. Without, the classes found are sorted: as
    numbers when all are, else as text.
    """

    def __init__(self, labels: Sequence[str] | None) -> None:
        self.labels = None if labels is None else tuple(labels)
        self.found: dict[str, int] = {}
        # Whether labels are names or positions is known at the end only: faults of both readings.
        self._odd: list[tuple[Source, Faults, Faults]] = []

    def numbers(self, source: Source, rows: Sequence[Row]) -> list[int]:
        """A number for each row's label, in the order of first appearance."""
        names = [str(row.fields["label"]).strip() for row in rows]
        numbers = [self.found.setdefault(name, len(self.found)) for name in names]
        if len(self.found) > LARGEST:
            raise DataError(
                f"more than {LARGEST:,} different labels: this is no column of classes",
                where=source.name,
                found=", ".join(list(self.found)[:3]) + ", ...",
            )
        if self.labels is not None:
            self._note_odd(source, rows, names, self.labels)
        return numbers

    def _note_odd(
        self, source: Source, rows: Sequence[Row], names: Sequence[str], labels: tuple[str, ...]
    ) -> None:
        if not self._odd or self._odd[-1][0] is not source:
            self._odd.append((source, Faults(), Faults()))
        _, named, counted = self._odd[-1]
        positions = [str(at) for at in range(len(labels))]
        for faults, known in ((named, labels), (counted, positions)):
            allowed, expected = set(known), _listed(known)
            for row, name in zip(rows, names, strict=True):
                if name not in allowed:
                    text = f'label "{name:.40}" is out of range: expected {expected}'
                    faults.add(row.line, text)

    def settle(self) -> tuple[list[int], tuple[str, ...]]:
        """The class id of each number given out, and the classes' names by id.

        Labels out of range become faults of their sources.
        """
        names = self.labels if self.labels is not None else _sorted_classes(list(self.found))
        by_name = not self.found.keys().isdisjoint(names)
        for source, named, counted in self._odd:
            source.faults.merge(named if by_name else counted)
        known = names if by_name else tuple(str(at) for at in range(len(names)))
        ids = {name: at for at, name in enumerate(known)}
        return [ids.get(name, 0) for name in self.found], names


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20:,} more" if len(names) > 20 else "")


def _sorted_classes(found: Sequence[str]) -> tuple[str, ...]:
    if all(name.removeprefix("-").isdecimal() for name in found):
        return tuple(sorted(found, key=int))
    return tuple(sorted(found))
