"""A request while it is answered: its tokens, its text, and whether it has ended (floor 5)."""

from __future__ import annotations

from typing import Any

from sidepath.errors import ServeError
from sidepath.serve.memory import out_of_memory, shed
from sidepath.serve.requests import Finish, Handle, Piece
from sidepath.serve.sampling import Chosen, Turn
from sidepath.serve.text import TextStream
from sidepath.serve.versions import Version


class Answering:
    """What the engine knows of a request that has not ended."""

    def __init__(
        self, handle: Handle, version: Version | None, end: frozenset[int], tokenizer: Any
    ) -> None:
        request = handle.request
        self.handle, self.version, self.end = handle, version, end
        self.tokens = list(request.prompt)
        self.prompt = len(request.prompt)
        self.text = (
            None if tokenizer is None else TextStream(tokenizer, request.prompt, request.stop)
        )
        self.cached = False
        """Whether it has a row of the cache."""

    @property
    def internal(self) -> str | None:
        """Its adapter's name on the model."""
        return None if self.version is None else self.version.internal

    def turn(self) -> Turn:
        """What the choice of its next token depends on."""
        return Turn(self.handle.request.sampling, self.tokens, len(self.tokens) - self.prompt)

    def take(self, chosen: Chosen) -> Piece:
        """Add a token, and say what the caller is to be given."""
        self.tokens.append(chosen.token)
        finish: Finish | None = None
        if chosen.token in self.end:
            finish = "stop"
        elif len(self.tokens) - self.prompt == self.handle.request.max_new_tokens:
            finish = "length"
        if self.text is None:
            return Piece(chosen, finish=finish)
        # An end token has no text of its own, be it a special one or not.
        text = "" if finish == "stop" else self.text.push(chosen.token)
        if finish is not None:
            text += self.text.finish()
        return Piece(chosen, text, "stop" if self.text.stopped else finish)

    def broken(self, error: BaseException) -> Piece:
        """The last piece of a request that could not be answered."""
        if out_of_memory(error):
            error = shed(error)
        if not isinstance(error, ServeError):
            found = ServeError(
                "the request could not be answered",
                found=f"{type(error).__name__}: {error}",
                hint="other requests go on; ask again, and report this if it comes again",
            )
            found.__cause__ = error
            error = found
        return Piece(None, finish="error", error=error)
