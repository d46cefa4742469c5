"""What is asked of the engine, and what comes back, piece by piece (floor 5)."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from sidepath.errors import ServeError
from sidepath.serve.forms import Form
from sidepath.serve.sampling import Chosen, Sampling

Finish = Literal["stop", "length", "cancelled", "error"]
"""Why an answer ended: an end token or a stop string; all tokens asked for; on request; a fault."""


@dataclass(frozen=True)
class Request:
    """A prompt in tokens, and how its answer is to be made."""

    prompt: tuple[int, ...]
    adapter: str | None = None
    """The name of the adapter that answers; None: the base."""
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are left out of it."""
    end: frozenset[int] | None = None
    """Tokens that end the answer; None: the base's own."""
    form: Form | None = None
    """The form of the answer (`form_of`); None: any text. It ends where nothing more can come."""
    salt: str = ""
    """Only requests of the same salt share what was computed of a common beginning (whose time
    would tell one caller what another asked)."""


@dataclass(frozen=True)
class Piece:
    """What one step added to an answer."""

    chosen: Chosen | None
    """The new token; None for a piece that only ends the answer."""
    text: str = ""
    """The text that is certain now; empty without a tokenizer."""
    finish: Finish | None = None
    """Set on the last piece."""
    error: ServeError | None = None


Listener = Callable[[Piece], None]


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    tokens: tuple[int, ...]
    """The end token, if there was one, is the last."""
    text: str
    finish: Finish
    chosen: tuple[Chosen, ...]


class Handle:
    """The caller's end of a request: iterate over its pieces, wait for the answer, or cancel it.

    With a listener of its own the pieces go there, and not to the handle.
    """

    def __init__(
        self,
        request: Request,
        number: int,
        generation: int | None,
        cancel: Callable[[int], None],
        listener: Listener | None = None,
    ) -> None:
        self.request = request
        self.number = number
        self.generation = generation
        """Which load of the adapter answers, to the last token; None: the base."""
        self.reused = 0
        """Tokens of the prompt that need not be computed, once it runs."""
        self._cancel = cancel
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self.put: Listener = listener if listener is not None else self._pieces.put
        """Where the engine puts the pieces."""

    def cancel(self) -> None:
        """Ask for the end: the row is free before the next step. Nothing if it has ended."""
        self._cancel(self.number)

    def __iter__(self) -> Iterator[Piece]:
        """Its pieces as they come, the last one with `finish`. Once only."""
        while True:
            piece = self._pieces.get()
            yield piece
            if piece.finish is not None:
                return

    def result(self) -> Answer:
        """Wait for the whole answer. Errors: the `ServeError` that ended it."""
        pieces = list(self)
        last = pieces[-1]
        if last.error is not None:
            raise last.error
        assert last.finish is not None
        chosen = tuple(piece.chosen for piece in pieces if piece.chosen is not None)
        text = "".join(piece.text for piece in pieces)
        return Answer(tuple(each.token for each in chosen), text, last.finish, chosen)
