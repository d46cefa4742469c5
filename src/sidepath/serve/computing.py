"""One step's rows: computed, sampled, and handed to their requests (floor 5).

What may go wrong with one request ends that request: rows whose call failed are tried again one by
one, and each that fails alone is answered with an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from sidepath.errors import ServeError
from sidepath.serve.answering import Answering
from sidepath.serve.requests import Piece
from sidepath.serve.runner import Piece as Part
from sidepath.serve.runner import Runner
from sidepath.serve.sampling import Chosen, choose
from sidepath.serve.scheduler import Row


class Computing:
    """The model's rows, and the requests in `answering` that they belong to. For one thread."""

    def __init__(self, runner: Runner, answering: Mapping[int, Answering]) -> None:
        self._runner, self._answering = runner, answering
        self.ended: Counter[str] = Counter()
        """Requests that ended, by their `finish`."""
        self.new_tokens = 0

    def step(self, rows: Iterable[Row]) -> set[int]:
        """Compute rows and hand out what comes of it; returns the requests that ended."""
        ended: set[int] = set()
        for call in self._calls(rows):
            ended |= self._answer(call)
        return ended

    def _calls(self, rows: Iterable[Row]) -> list[list[Row]]:
        """The rows of each call of the model: those with the same number of tokens together, in the
        order of the cache, which reads them without a copy then.
        """
        alike: dict[int, list[Row]] = {}
        for row in rows:
            alike.setdefault(row.count, []).append(row)
        place = self._runner.cache.row_of
        return [sorted(call, key=lambda row: place(row.request)) for call in alike.values()]

    def _answer(self, rows: list[Row]) -> set[int]:
        due = [index for index, row in enumerate(rows) if row.samples]
        answering = [self._answering[rows[index].request] for index in due]
        try:
            logits_BV = self._runner.logits([self._part(row) for row in rows])
            found = choose(logits_BV[due], [each.turn() for each in answering]) if due else []
        except Exception as error:
            if len(rows) > 1:  # nothing was handed out yet, and the cache takes it twice
                return set().union(*(self._answer([row]) for row in rows))
            return self.put(rows[0].request, self._answering[rows[0].request].broken(error))
        ended = [self._hand_out(*each) for each in zip(answering, found, strict=True)]
        return set().union(*ended)

    def _part(self, row: Row) -> Part:
        answering = self._answering[row.request]
        tokens = tuple(answering.tokens[row.start : row.start + row.count])
        return Part(row.request, answering.internal, row.start, tokens)

    def _hand_out(self, answering: Answering, chosen: Chosen | None) -> set[int]:
        try:
            if chosen is None:
                raise ServeError("the logits are not numbers", found="NaN or Inf")
            piece = answering.take(chosen)
            self.new_tokens += 1
        except Exception as error:  # of the tokenizer, say
            piece = answering.broken(error)
        return self.put(answering.handle.number, piece)

    def put(self, number: int, piece: Piece) -> set[int]:
        """Give a piece to its request; returns it if that was the last."""
        finish = piece.finish
        try:
            self._answering[number].handle.put(piece)
        except Exception:  # whoever listens does not listen any more
            finish = "cancelled"
        if finish is None:
            return set()
        self.ended[finish] += 1
        return {number}
