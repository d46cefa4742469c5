"""Rows that begin alike are computed once (floor 5).

The keys and values of a prompt's first tokens depend on these tokens and on the adapter alone. A
request that enters takes them from a row that has them: one that runs, or one of the rows of ended
requests that are kept for this. A row is known by whose it is (`Key`: a version of an adapter, and
what the caller adds to keep its own apart) and by its tokens; never by tokens alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from sidepath.serve.cache import RowsCache

Key = tuple[str | None, str]
"""The version's name on the model (None: the base), and the caller's salt."""
LEAST = 16
"""A shorter prefix is computed anew: it is not worth a copy."""


@dataclass(frozen=True)
class _Held:
    """What a row holds."""

    key: Key
    tokens: Sequence[int]


class Prefixes:
    """The rows of a cache, some kept after their requests, the longest unused given up first."""

    def __init__(self, cache: RowsCache, least: int = LEAST) -> None:
        self._cache, self._least = cache, least
        self._running: dict[int, _Held] = {}
        self._kept: OrderedDict[int, _Held] = OrderedDict()
        """By row."""
        self.lookups = self.hits = self.tokens = 0
        """Requests that entered, those that found a prefix, and the tokens these took."""

    def begin(self, owner: int, key: Key, tokens: Sequence[int]) -> int:
        """Give a request a row; returns how many of its first tokens stand there already, at most
        all but one. `tokens` may grow.
        """
        row, length = self._longest(key, tokens)
        self._cache.claim(owner)
        self._running[owner] = _Held(key, tokens)
        self.lookups += 1
        if length < self._least:
            return 0
        self._cache.copy(row, owner, length)
        if row in self._kept:
            self._kept.move_to_end(row)
        self.hits += 1
        self.tokens += length
        return length

    def end(self, owner: int, *, keep: bool) -> None:
        """Take a request's row back; what was computed is kept, unless it is known to be bad or a
        row holds it already.
        """
        held = self._running.pop(owner)
        computed = tuple(held.tokens[: self._cache.length(owner)])
        if keep and len(computed) >= self._least:
            row = self._row_for(held.key, computed)
            if row is not None:
                self._cache.keep(owner, row)
                self._kept[row] = _Held(held.key, computed)
                self._kept.move_to_end(row)
        self._cache.release(owner)

    def drop(self, adapter: str) -> None:
        """Give up what was kept of a version: nobody can ask for it any more."""
        for row in [row for row, held in self._kept.items() if held.key[0] == adapter]:
            del self._kept[row]
            self._cache.clear(row)

    def _longest(self, key: Key, tokens: Sequence[int]) -> tuple[int, int]:
        """The row that begins most like these tokens, and how far."""
        rows = [(self._cache.row_of(owner), held) for owner, held in self._running.items()]
        most, found = 0, -1
        for row, held in (*rows, *self._kept.items()):
            if held.key == key:
                computed = min(len(tokens) - 1, self._cache.written(row))
                length = common(held.tokens, tokens, computed)
                if length > most:
                    most, found = length, row
        return found, most

    def _row_for(self, key: Key, computed: tuple[int, ...]) -> int | None:
        """Where to keep these tokens: over a row that holds their beginning, in a free one, or
        over the longest unused. None if a row holds them.
        """
        for row, held in self._kept.items():
            if held.key == key:
                shorter = min(len(held.tokens), len(computed))
                if common(held.tokens, computed, shorter) == shorter:
                    if len(held.tokens) >= len(computed):
                        self._kept.move_to_end(row)
                        return None
                    return row
        free = [row for row in self._cache.kept_rows if row not in self._kept]
        if free:
            return free[0]
        return next(iter(self._kept), None)


def common(one: Sequence[int], other: Sequence[int], most: int) -> int:
    """How many tokens, at most so many, two rows have in common from the first on."""
    a, b = tuple(one[:most]), tuple(other[:most])
    most = min(len(a), len(b))
    if a[:most] == b[:most]:
        return most
    return next(at for at in range(most) if a[at] != b[at])
