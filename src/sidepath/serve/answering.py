"""A request while it is answered: its tokens, its text, and whether it has ended (floor 5)."""

from __future__ import annotations

from typing import Any

from torch import nn

from sidepath.errors import RequestRefused, ServeError
from sidepath.serve.memory import out_of_memory, shed
from sidepath.serve.prefixes import Key
from sidepath.serve.requests import Finish, Handle, Piece, Request
from sidepath.serve.sampling import Chosen, Turn
from sidepath.serve.text import TextStream, check_stops
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
        self.form = None if request.form is None else request.form.begin()
        self.cached = False
        """Whether it has a row of the cache."""
        self.failed = False
        """Whether its row may hold what is not right."""

    @property
    def internal(self) -> str | None:
        """Its adapter's name on the model."""
        return None if self.version is None else self.version.internal

    @property
    def key(self) -> Key:
        """Whose its keys and values are."""
        return self.internal, self.handle.request.salt

    def turn(self) -> Turn:
        """What the choice of its next token depends on."""
        allowed = None if self.form is None else self.form.allowed
        sampling = self.handle.request.sampling
        return Turn(sampling, self.tokens, len(self.tokens) - self.prompt, allowed)

    def take(self, chosen: Chosen) -> Piece:
        """Add a token, and say what the caller is to be given."""
        self.tokens.append(chosen.token)
        finish: Finish | None = None
        ended = chosen.token in self.end
        whole = self.form is not None and not ended and self.form.take(chosen.token)
        if ended or whole:
            finish = "stop"
        elif len(self.tokens) - self.prompt == self.handle.request.max_new_tokens:
            finish = "length"
        if self.text is None:
            return Piece(chosen, finish=finish)
        # An end token has no text of its own, be it a special one or not.
        text = "" if ended else self.text.push(chosen.token)
        if finish is not None:
            text += self.text.finish()
        return Piece(chosen, text, "stop" if self.text.stopped else finish)

    def broken(self, error: BaseException) -> Piece:
        """The last piece of a request that could not be answered."""
        self.failed = True
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


def check(request: Request, vocabulary: int, tokenizer: Any) -> None:
    """Errors: `RequestRefused` for tokens the base does not know, and for stop strings that cannot
    be followed.
    """
    wrong = [token for token in request.prompt if not 0 <= token < vocabulary]
    if wrong:
        raise RequestRefused(
            "the prompt has tokens that the base does not know",
            found=", ".join(map(str, wrong[:5])),
            expected=f"from 0 to {vocabulary - 1}",
        )
    check_stops(request.stop)
    if request.stop and tokenizer is None:
        raise RequestRefused("stop strings need a tokenizer", hint="Engine(model, tokenizer)")


def end_tokens(model: nn.Module) -> frozenset[int]:
    """The tokens that end an answer of this base, as `generate` takes them."""
    settings: Any = model.generation_config
    end = settings.eos_token_id
    if end is None:
        return frozenset()
    return frozenset(end) if isinstance(end, list) else frozenset([int(end)])
