"""Many requests at a time over one base, each answered by its own adapter (floor 5).

`submit` puts a request into the scheduler's queue. Each step asks the scheduler for a batch, calls
the model for its rows (those with one new token together; prompts piece by piece), and puts each
new token into its request's queue. One thread steps; nothing else touches the model: what changes
it (an adapter that comes or goes) is done by that thread between two steps (`errands.py`).

An adapter that is asked for and not on the model is brought there by a thread of its own
(`tiers.py`); its requests wait for it, others go on.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from sidepath.serve.answering import Answering, check, end_tokens
from sidepath.serve.computing import Computing
from sidepath.serve.prefixes import Prefixes
from sidepath.serve.requests import Handle, Listener, Piece, Request
from sidepath.serve.runner import Runner
from sidepath.serve.scheduler import Batch, Limits, Scheduler
from sidepath.serve.tiers import Memory
from sidepath.serve.versions import Version
from sidepath.serve.worker import Worker


class Engine(Worker):
    """Continuous batching over a causal model of `transformers`, which is put into eval mode.

    `with Engine(model, tokenizer) as engine:` lets a thread step; without it, call `step`
    yourself. Until `close` the model belongs to the engine. `limits.context` is cut to the model's
    own. Greedy answers are those of `model.generate` with the adapter alone.

    `merged`: one adapter answers, folded into the base (`adapters.dedicate`), at the base's own
    speed; nobody else is known then, the base neither. `laid_out`: while the engine is open, the
    linear layers of a base on the CPU have a second copy in blocks, which multiplies few rows in
    half to two thirds of the time.

    Errors: `UnsupportedModule` for a model whose rows cannot be kept apart.
    """

    called = "engine"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        limits: Limits | None = None,
        memory: Memory | None = None,
        *,
        merged: bool = False,
        laid_out: bool = True,
    ) -> None:
        limits = limits if limits is not None else Limits()
        own: int = getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0  # type: ignore[operator, union-attr]
        self.limits = dataclasses.replace(
            limits, context=min(limits.context, own or limits.context)
        )
        self.model, self.tokenizer = model, tokenizer
        self.steps = self.computed_tokens = 0
        limits = self.limits
        self._runner = Runner(model, limits.rows, limits.context, limits.prefixes, not merged)
        self.prefixes = Prefixes(self._runner.cache)
        """What requests share that begin alike."""
        self._end = end_tokens(model)
        self._answering: dict[int, Answering] = {}
        self._computing = Computing(self._runner, self._answering)
        self._cancelled: set[int] = set()
        self._numbers = 0
        super().__init__(
            model,
            memory,
            self._runner.forget,
            self.prefixes.drop,
            merged=merged,
            laid_out=laid_out,
        )
        self._scheduler = Scheduler(self.limits, self.adapters.standing)

    # --- requests, from any thread

    def submit(self, request: Request, listener: Listener | None = None) -> Handle:
        """Begin to answer a request; its pieces come through the handle, or to `listener`, which is
        called by the engine's thread and must return at once.

        Errors: `UnknownAdapter`; `RequestRefused` with every reason; `Overloaded`; `ServeError`
        once the engine is closed. Nothing is left of a request that was refused.
        """
        check(request, self._runner.vocabulary, self.tokenizer)
        version = self.adapters.acquire(request.adapter)
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

    def _cancel(self, number: int) -> None:
        with self._lock:
            if number in self._answering:
                self._cancelled.add(number)
        self._wake.set()

    @property
    def ended(self) -> Counter[str]:
        """Requests that ended, by their `finish`."""
        return self._computing.ended

    @property
    def new_tokens(self) -> int:
        """Tokens of answers."""
        return self._computing.new_tokens

    @property
    def load(self) -> tuple[int, int, int]:
        """How many requests wait, how many run, and how many different adapters these name."""
        with self._lock:
            now = self._scheduler
            return now.waiting, len(now.running), len(now.slots)

    # --- steps, by one thread

    def _answer(self) -> bool:
        batch = self._next()
        if batch is None:
            return False
        ended = self._computing.step(batch.rows)
        self.steps += 1
        self.computed_tokens += batch.tokens
        with self._lock:
            self._scheduler.done(batch, ended)
        for number in ended:
            self._forget(number)
        return True

    def _next(self) -> Batch | None:
        with self._lock:
            entered = [self._answering[number] for number in self._scheduler.admit()]
        for each in entered:
            number = each.handle.number
            each.handle.reused = self.prefixes.begin(number, each.key, each.tokens)
            each.cached = True
        with self._lock:
            for each in entered:
                self._scheduler.skip(each.handle.number, each.handle.reused)
            return self._scheduler.batch()

    def _waits(self) -> bool:
        return bool(self._answering)

    def _wanted(self) -> list[str]:
        return self._scheduler.wanted()

    def _runs(self, version: Version) -> bool:
        return self._scheduler.runs(version.internal)

    def _since(self, version: Version) -> int | None:
        return self._scheduler.since(version.internal)

    def _end_cancelled(self) -> None:
        with self._lock:
            numbers, self._cancelled = self._cancelled, set()
            numbers &= set(self._answering)
        self._end_early({number: Piece(None, finish="cancelled") for number in numbers})

    def _give_up(self, version: Version, error: Exception) -> None:
        with self._lock:
            every = list(self._answering.items())
        own = [(number, each) for number, each in every if each.version is version]
        self._end_early({number: each.broken(error) for number, each in own})

    def _end_early(self, pieces: Mapping[int, Piece]) -> None:
        with self._lock:
            for number in pieces:
                self._scheduler.cancel(number)
        for number, piece in pieces.items():
            self._computing.put(number, piece)
            self._forget(number)

    def _forget(self, number: int) -> None:
        with self._lock:
            answering = self._answering.pop(number)
        if answering.cached:
            self.prefixes.end(number, keep=not answering.failed)
        if answering.version is not None:
            self.adapters.release(answering.version)

    def close(self, *, drain: bool = False) -> None:
        """Refuse new requests; end those there are, or with `drain` answer them first. The adapters
        stay on the model.
        """
        with self._lock:
            self.closed = True
            if not drain:
                self._cancelled |= set(self._answering)
        super().close()

    def _end_all(self, error: BaseException) -> None:
        with self._lock:
            left = list(self._answering.values())
            self._answering.clear()
        for each in left:
            each.handle.put(each.broken(error))
