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
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from sidepath.errors import ServeError
from sidepath.serve.adapters import Adapters
from sidepath.serve.answering import Answering, check, end_tokens
from sidepath.serve.computing import Computing
from sidepath.serve.errands import Errands
from sidepath.serve.prefixes import Prefixes
from sidepath.serve.requests import Handle, Listener, Piece, Request
from sidepath.serve.runner import Runner
from sidepath.serve.scheduler import Batch, Limits, Scheduler
from sidepath.serve.tiers import Memory
from sidepath.serve.versions import Version


class Engine:
    """Continuous batching over a causal model of `transformers`, which is put into eval mode.

    `with Engine(model, tokenizer) as engine:` lets a thread step; without it, call `step`
    yourself. Until `close` the model belongs to the engine. `limits.context` is cut to the model's
    own. Greedy answers are those of `model.generate` with the adapter alone.

    `merged`: one adapter answers, folded into the base (`adapters.dedicate`), at the base's own
    speed; nobody else is known then, the base neither.

    Errors: `UnsupportedModule` for a model whose rows cannot be kept apart.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        limits: Limits | None = None,
        memory: Memory | None = None,
        *,
        merged: bool = False,
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
        self.closed = False
        """Whether new requests are refused."""
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._errands = Errands(self._wake.set)
        self.adapters = Adapters(
            model,
            self._errands,
            self._runner.forget,
            self.prefixes.drop,
            self._rank,
            memory,
            merged,
        )
        """Those that can be asked for by name: `register`, `load`, `unload`, `pin`, `versions`,
        from any thread."""
        self._scheduler = Scheduler(self.limits, self.adapters.standing)
        self._thread: threading.Thread | None = None

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

    @property
    def alive(self) -> bool:
        """Whether its thread steps."""
        return self._thread is not None and self._thread.is_alive()

    # --- steps, by one thread

    def step(self) -> bool:
        """One step: returns False when there was nothing to do. Not while a thread steps.

        Where nothing can be computed before an adapter has come, it waits for that.
        """
        self._wake.clear()
        self._errands.run()
        self.adapters.tidy()
        with self._errands.turn:
            self._end_cancelled()
            self._bring()
            self._end_failed()
            batch = self._next()
            if batch is not None:
                ended = self._computing.step(batch.rows)
                self.steps += 1
                self.computed_tokens += batch.tokens
                with self._lock:
                    self._scheduler.done(batch, ended)
                for number in ended:
                    self._forget(number)
                return True
            coming = self.adapters.busy
        if coming:
            self._wake.wait()
        return coming

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

    def _bring(self) -> None:
        """Begin to bring the adapters that are asked for and not there, as far as there is room:
        the oldest request's first, or it might never come.
        """
        with self._lock:
            wanted = self._scheduler.wanted()
        for internal in wanted:
            if not self.adapters.bring(internal):
                return

    def _rank(self, version: Version, coming: Version) -> tuple[int, ...] | None:
        """Who leaves the model for one that comes: nobody who runs, or whose oldest request is
        older. First those that nobody waits for, the longest unused of them.
        """
        with self._lock:
            if self._scheduler.runs(version.internal):
                return None
            since = self._scheduler.since(version.internal)
            asked = self._scheduler.since(coming.internal)
        if since is None:
            return (0, version.used)
        return None if asked is None or since < asked else (1, -since)

    def _end_cancelled(self) -> None:
        with self._lock:
            numbers, self._cancelled = self._cancelled, set()
            numbers &= set(self._answering)
        self._end_early({number: Piece(None, finish="cancelled") for number in numbers})

    def _end_failed(self) -> None:
        """End the requests of adapters that could not be brought."""
        for version, error in self.adapters.failures():
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
