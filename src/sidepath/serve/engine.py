"""Many requests at a time over one base, each answered by its own adapter (floor 5).

`submit` puts a request into the scheduler's queue. Each step asks the scheduler for a batch, calls
the model for its rows (those with one new token together; prompts piece by piece), and puts each
new token into its request's queue. One thread steps; nothing else touches the model: what changes
it (an adapter that comes or goes) is done by that thread between two steps (`errands.py`).

What may go wrong with one request ends that request: rows whose step failed are tried again one by
one, and each that fails alone is answered with an error.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from sidepath.errors import RequestRefused, ServeError
from sidepath.serve.adapters import Adapters
from sidepath.serve.answering import Answering
from sidepath.serve.errands import Errands
from sidepath.serve.requests import Handle, Listener, Piece, Request
from sidepath.serve.runner import Piece as Part
from sidepath.serve.runner import Runner
from sidepath.serve.sampling import Chosen, choose
from sidepath.serve.scheduler import Limits, Row, Scheduler
from sidepath.serve.text import check_stops


class Engine:
    """Continuous batching over a causal model of `transformers`, which is put into eval mode.

    `with Engine(model, tokenizer) as engine:` lets a thread step; without it, call `step`
    yourself. Until `close` the model belongs to the engine. `limits.context` is cut to the model's
    own. Greedy answers are those of `model.generate` with the adapter alone.

    Errors: `UnsupportedModule` for a model whose rows cannot be kept apart.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any = None, limits: Limits | None = None
    ) -> None:
        limits = limits if limits is not None else Limits()
        own: int = getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0  # type: ignore[operator, union-attr]
        self.limits = dataclasses.replace(
            limits, context=min(limits.context, own or limits.context)
        )
        self.model, self.tokenizer = model, tokenizer
        self.ended: Counter[str] = Counter()
        """Requests that ended, by their `finish`."""
        self.steps = self.computed_tokens = self.new_tokens = 0
        self._runner = Runner(model, self.limits.rows, self.limits.context)
        self._end = end_tokens(model)
        self._scheduler = Scheduler(self.limits)
        self._answering: dict[int, Answering] = {}
        self._cancelled: set[int] = set()
        self._numbers = 0
        self.closed = False
        """Whether new requests are refused."""
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._errands = Errands(self._wake.set)
        self.adapters = Adapters(model, self._errands, self._runner.forget)
        """Those that can be asked for by name: `load`, `unload`, `versions`, from any thread."""
        self._thread: threading.Thread | None = None

    # --- requests, from any thread

    def submit(self, request: Request, listener: Listener | None = None) -> Handle:
        """Begin to answer a request; its pieces come through the handle, or to `listener`, which is
        called by the engine's thread and must return at once.

        Errors: `UnknownAdapter`; `RequestRefused` with every reason; `Overloaded`; `ServeError`
        once the engine is closed. Nothing is left of a request that was refused.
        """
        self._check(request)
        version = None if request.adapter is None else self.adapters.acquire(request.adapter)
        try:
            with self._lock:
                self._refuse_closed()
                number = self._numbers
                internal = None if version is None else version.internal
                self._scheduler.submit(
                    number, internal, len(request.prompt), request.max_new_tokens
                )
                self._numbers += 1
                generation = None if version is None else version.generation
                handle = Handle(request, number, generation, self._cancel, listener)
                end = self._end if request.end is None else request.end
                self._answering[number] = Answering(handle, version, end, self.tokenizer)
        except BaseException:
            if version is not None:
                self.adapters.release(version)
            raise
        self._wake.set()
        return handle

    def _check(self, request: Request) -> None:
        wrong = [t for t in request.prompt if not 0 <= t < self._runner.vocabulary]
        if wrong:
            raise RequestRefused(
                "the prompt has tokens that the base does not know",
                found=", ".join(map(str, wrong[:5])),
                expected=f"from 0 to {self._runner.vocabulary - 1}",
            )
        check_stops(request.stop)
        if request.stop and self.tokenizer is None:
            raise RequestRefused("stop strings need a tokenizer", hint="Engine(model, tokenizer)")

    def _cancel(self, number: int) -> None:
        with self._lock:
            if number in self._answering:
                self._cancelled.add(number)
        self._wake.set()

    @property
    def load(self) -> tuple[int, int, int]:
        """How many requests wait, how many run, and how many different adapters these name."""
        with self._lock:
            now = self._scheduler
            return now.waiting, len(now.running), len(now.slots)

    @property
    def alive(self) -> bool:
        """Whether its thread steps."""
        return self._thread is not None and self._thread.is_alive()

    # --- steps, by one thread

    def step(self) -> bool:
        """One step: returns False when there was nothing to do. Not while a thread steps."""
        self._errands.run()
        self.adapters.tidy()
        with self._errands.turn:
            self._end_cancelled()
            with self._lock:
                batch = self._scheduler.next()
            if batch is None:
                return False
            for row in batch.rows:
                self._claim(row)
            ended: set[int] = set()
            for rows in self._calls(batch.rows):
                ended |= self._answer(rows)
            self.steps += 1
            self.computed_tokens += batch.tokens
            with self._lock:
                self._scheduler.done(batch, ended)
            for number in ended:
                self._forget(number)
        return True

    def _claim(self, row: Row) -> None:
        answering = self._answering[row.request]
        if not answering.cached:
            self._runner.cache.claim(row.request)
            answering.cached = True

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
        """Compute some rows and hand out what came of it; returns the requests that ended."""
        due = [index for index, row in enumerate(rows) if row.samples]
        answering = [self._answering[rows[index].request] for index in due]
        try:
            logits_BV = self._runner.logits([self._part(row) for row in rows])
            found = choose(logits_BV[due], [each.turn() for each in answering]) if due else []
        except Exception as error:
            if len(rows) > 1:  # nothing was handed out yet, and the cache takes it twice
                return set().union(*(self._answer([row]) for row in rows))
            return self._put(rows[0].request, self._answering[rows[0].request].broken(error))
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
        return self._put(answering.handle.number, piece)

    def _put(self, number: int, piece: Piece) -> set[int]:
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

    def _end_cancelled(self) -> None:
        with self._lock:
            numbers, self._cancelled = self._cancelled, set()
            numbers &= set(self._answering)
            for number in numbers:
                self._scheduler.cancel(number)
        for number in numbers:
            self._put(number, Piece(None, finish="cancelled"))
            self._forget(number)

    def _forget(self, number: int) -> None:
        with self._lock:
            answering = self._answering.pop(number)
        if answering.cached:
            self._runner.cache.release(number)
        if answering.version is not None:
            self.adapters.release(answering.version)

    # --- the thread

    def __enter__(self) -> Engine:
        self._thread = threading.Thread(target=self._run, name="sidepath-engine", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self, *, drain: bool = False) -> None:
        """Refuse new requests; end those there are, or with `drain` answer them first. The adapters
        stay on the model.
        """
        with self._lock:
            self.closed = True
            if not drain:
                self._cancelled |= set(self._answering)
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        else:
            while self.step():
                pass

    def _refuse_closed(self) -> None:
        if self.closed:
            raise ServeError("the engine is closed", hint="start another one")

    def _run(self) -> None:
        self._errands.begin()
        try:
            while not (self.closed and not self._answering):
                self._wake.clear()
                if not self.step() and not self.closed:
                    self._wake.wait()
        except BaseException as error:
            self._end_all(error)
            raise
        finally:
            self._errands.end()
            self.adapters.tidy()

    def _end_all(self, error: BaseException) -> None:
        """The engine itself failed: nobody is left waiting."""
        with self._lock:
            self.closed = True
            left = list(self._answering.values())
            self._answering.clear()
        for each in left:
            each.handle.put(each.broken(error))


def end_tokens(model: nn.Module) -> frozenset[int]:
    """The tokens that end an answer of this base, as `generate` takes them."""
    settings: Any = model.generation_config
    end = settings.eos_token_id
    if end is None:
        return frozenset()
    return frozenset(end) if isinstance(end, list) else frozenset([int(end)])
