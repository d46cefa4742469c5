"""Tokens to text as they come, and where a stop string ends it (floor 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sidepath.errors import RequestRefused

UNFINISHED = "\ufffd"
"""What a tokenizer gives for the first bytes of a character of several."""
MOST_STOPS = 16
LONGEST_STOP = 256


def check_stops(stops: Sequence[str]) -> None:
    """Errors: `RequestRefused` for stop strings that are empty, too long or too many."""
    faults = [
        f"stop string {stop!r:.40} has {len(stop)} characters: 1 to {LONGEST_STOP} are possible"
        for stop in stops
        if not 1 <= len(stop) <= LONGEST_STOP
    ]
    if len(stops) > MOST_STOPS:
        faults.append(f"{len(stops)} stop strings: at most {MOST_STOPS} are possible")
    if faults:
        raise RequestRefused("the answer cannot be stopped like this", faults=faults)


class TextStream:
    """The text of one answer. The pieces it gives, one after another, are the text of all tokens
    up to the stop string that is complete first (of two that end together, the longer), which is
    left out; nothing that was given is ever taken back.

    A character whose bytes are not all there is held back, and so is what may be the beginning of a
    stop string. Special tokens have no text.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        # Some tokenizers write a token otherwise at the beginning: a few tokens go before.
        self._tokens = list(prompt[-4:])
        self._from, self._done = 0, len(self._tokens)
        self._held = ""
        self.stopped = False
        """Whether a stop string was found: no more text will come."""

    def push(self, token: int) -> str:
        """The text that is certain now that `token` has come."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        return self._given(self._new(final=False), final=False)

    def finish(self) -> str:
        """The rest, when no token will come any more."""
        return "" if self.stopped else self._given(self._new(final=True), final=True)

    def _new(self, *, final: bool) -> str:
        before = self._decoded(self._tokens[self._from : self._done])
        now = self._decoded(self._tokens[self._from :])
        if len(now) <= len(before) or (now.endswith(UNFINISHED) and not final):
            return ""
        self._from, self._done = self._done, len(self._tokens)
        return now[len(before) :]

    def _decoded(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _given(self, new: str, *, final: bool) -> str:
        text = self._held + new
        # The stop string that is complete first counts: so the answer does not depend on where
        # tokens part, as it would if one that begins earlier and is not complete yet could win.
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        kept = 0 if final else max((_begun(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    most = min(len(stop) - 1, len(text))
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
