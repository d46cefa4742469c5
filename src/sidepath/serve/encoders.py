"""An encoder that answers many texts at a time, each by its own adapter (floor 5).

Texts that wait are answered together, in the order they came: one call of the model for texts of
every adapter that is there (`sidepath.route`), padded to the longest. Adapters come and go as the
engine's do (`adapters.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sidepath.errors import Overloaded, ServeError, UnknownAdapter
from sidepath.serve.encoding import Encoding
from sidepath.serve.pooling import Pooling
from sidepath.serve.tiers import Memory
from sidepath.serve.versions import Version
from sidepath.serve.worker import Worker


@dataclass(frozen=True)
class Room:
    """How much an encoder takes at a time."""

    rows: int = 32
    """Texts of one call."""
    tokens: int = 8192
    """Tokens of one call, padding counted; one text may have more."""
    queue: int = 4096
    """Texts that may wait."""


@dataclass(eq=False)
class _Text:
    tokens: tuple[int, ...]
    version: Version | None
    number: int
    found: Future[list[float]] = field(default_factory=Future)

    @property
    def internal(self) -> str | None:
        return None if self.version is None else self.version.internal


class Encoder(Worker):
    """An encoder of `transformers`, in eval mode. `with Encoder(...) as encoder:` lets a thread
    answer; until `close` the model belongs to it.

    `pooling`: texts become vectors; None: the model classifies them, and its logits are given.
    """

    called = "encoder"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        pooling: Pooling | None,
        room: Room | None = None,
        memory: Memory | None = None,
        *,
        alone: bool = True,
        laid_out: bool = True,
    ) -> None:
        self.alone = alone
        """Whether the base answers without an adapter."""
        self.encoding = Encoding(model, tokenizer, pooling)
        self.room = room if room is not None else Room()
        self.calls = self.answered = 0
        self._waiting: dict[int, _Text] = {}
        self._numbers = 0
        super().__init__(model, memory, _nothing, _nothing, laid_out=laid_out)

    def submit(
        self, adapter: str | None, texts: Sequence[tuple[int, ...]]
    ) -> tuple[Version | None, list[Future[list[float]]]]:
        """Begin to answer texts by an adapter (None: the base): their vectors, or logits. Returns
        also the version that answers them all.

        Errors: `UnknownAdapter`; `Overloaded`; `ServeError` once it is closed.
        """
        if adapter is None and not self.alone:
            raise UnknownAdapter(
                "the base has no classes of its own", hint="ask for an adapter, which brings some"
            )
        found: list[Future[list[float]]] = []
        version = None
        with self._lock:
            self._refuse_closed()
            if len(self._waiting) + len(texts) > self.room.queue:
                raise Overloaded("the queue is full", found=f"{len(self._waiting)} texts wait")
            for tokens in texts:
                # One acquired more often is the same version still.
                version = self.adapters.acquire(adapter) if version is None else version
                text = _Text(tokens, version, self._numbers)
                self._waiting[self._numbers] = text
                self._numbers += 1
                found.append(text.found)
            if version is not None:
                self.adapters.again(version, len(texts) - 1)
        self._wake.set()
        return version, found

    @property
    def waiting(self) -> int:
        """How many texts wait."""
        return len(self._waiting)

    # --- calls, by one thread

    def _answer(self) -> bool:
        texts = self._next()
        if texts:
            self._call(texts)
        return bool(texts)

    def _end_cancelled(self) -> None:
        with self._lock:
            cancelled = [text for text in self._waiting.values() if text.found.cancelled()]
        for text in cancelled:
            self._end(text, [])

    def _waits(self) -> bool:
        return bool(self._waiting)

    def _wanted(self) -> list[str]:
        versions = [text.version for text in self._waiting.values()]
        away = [each for each in versions if each is not None and each.standing == "away"]
        return list(dict.fromkeys(each.internal for each in away))

    def _runs(self, version: Version) -> bool:
        return False

    def _since(self, version: Version) -> int | None:
        waiting = self._waiting.values()
        return next((text.number for text in waiting if text.version is version), None)

    def _next(self) -> list[_Text]:
        """The texts of the next call: the oldest whose adapters are there, as far as they fit."""
        with self._lock:
            waiting = list(self._waiting.values())
        taken: list[_Text] = []
        longest = 0
        for text in waiting:
            if text.version is not None and text.version.standing != "here":
                continue
            longest = max(longest, len(text.tokens))
            if taken and longest * (len(taken) + 1) > self.room.tokens:
                break
            taken.append(text)
            if len(taken) == self.room.rows:
                break
        return taken

    def _call(self, texts: list[_Text]) -> None:
        try:
            rows = self.encoding.rows(
                [text.tokens for text in texts], [text.internal for text in texts]
            )
            self.calls += 1
        except Exception as error:
            if len(texts) > 1:
                for text in texts:
                    self._call([text])
            else:
                self._end(texts[0], _failed(error))
            return
        for text, row in zip(texts, rows, strict=True):
            finite = all(map(_finite, row))
            self._end(text, row if finite else _failed(ValueError("NaN or Inf")))

    def _end(self, text: _Text, found: list[float] | ServeError) -> None:
        with self._lock:
            del self._waiting[text.number]
        if text.version is not None:
            self.adapters.release(text.version)
        self.answered += 1
        if not text.found.set_running_or_notify_cancel():
            return
        if isinstance(found, ServeError):
            text.found.set_exception(found)
        else:
            text.found.set_result(found)

    def _give_up(self, version: Version, error: Exception) -> None:
        with self._lock:
            own = [text for text in self._waiting.values() if text.version is version]
        for text in own:
            self._end(text, _failed(error))

    def _end_all(self, error: BaseException) -> None:
        with self._lock:
            left = list(self._waiting.values())
            self._waiting.clear()
        for text in left:
            if text.found.set_running_or_notify_cancel():
                text.found.set_exception(_failed(error))


def _nothing(internal: str) -> None:
    """Nothing is kept of an adapter between two calls."""


def _finite(number: float) -> bool:
    return number - number == 0


def _failed(error: BaseException) -> ServeError:
    if isinstance(error, ServeError):
        return error
    found = ServeError("the text could not be answered", found=f"{type(error).__name__}: {error}")
    found.__cause__ = error
    return found
