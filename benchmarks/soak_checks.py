"""Holds every answer of the soak against what its own adapter says, and counts."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.soak_library import BASE, Library, Question

MOST_FAULTS = 50
"""Faults that are told in words; all are counted."""


@dataclass(frozen=True)
class Standing:
    """What is known of a name at one time."""

    state: Literal["there", "changing", "gone"]
    turn: int
    """Counts the changes of `state`."""
    generation: int
    """The newest generation whose load was acknowledged."""


@dataclass(frozen=True)
class Answer:
    """What came of one choice of a reply."""

    name: str
    question: Question
    generation: int | None
    text: str
    whole: bool
    """Whether it ended, or its caller went away before."""


class Checks:
    """Counts and faults of one run. Safe for several threads."""

    def __init__(self, library: Library, generations: dict[str, int]) -> None:
        """`generations` are those of the names at the beginning."""
        self.library, self.counts = library, Counter[str]()
        self.faults: list[str] = []
        self._lock = threading.Lock()
        self._folders = {number: f"{name}-0" for name, number in generations.items()}
        self._standing = {name: Standing("there", 0, generations[name]) for name in generations}
        self._waiting: list[Answer] = []
        self._texts: dict[str, str] = {}
        for (folder, _), text in library.said.items():
            self._texts.setdefault(text, folder)

    def count(self, *kinds: str) -> None:
        """One more of each kind."""
        with self._lock:
            self.counts.update(kinds)

    def fault(self, kind: str, words: str) -> None:
        """Something that must not happen."""
        with self._lock:
            self.counts[f"fault: {kind}"] += 1
            if len(self.faults) < MOST_FAULTS:
                self.faults.append(f"{kind}: {words}")
                print(self.faults[-1], file=sys.stderr)

    @property
    def failed(self) -> int:
        """Faults so far."""
        with self._lock:
            return sum(n for kind, n in self.counts.items() if kind.startswith("fault: "))

    # --- what operators do to names

    def standing(self, name: str) -> Standing:
        """What is known of a name just now; the base is always there."""
        with self._lock:
            return self._standing.get(name, Standing("there", 0, 0))

    def stands(self, name: str, state: Literal["there", "changing", "gone"]) -> None:
        """A name is in another state from now on."""
        with self._lock:
            old = self._standing[name]
            self._standing[name] = Standing(state, old.turn + 1, old.generation)

    def loaded(self, name: str, generation: int, folder: str) -> None:
        """A load was acknowledged."""
        with self._lock:
            old = self._standing[name]
            if generation <= old.generation:
                self.counts["fault: generation"] += 1
            self._folders[generation] = folder
            self._standing[name] = Standing("there", old.turn + 1, generation)

    # --- what callers get

    def missing(self, name: str, before: Standing) -> None:
        """A name was answered 404."""
        now = self.standing(name)
        if before.state == "there" and now.turn == before.turn:
            self.fault("not found", f"{name} was there all the time, and is unknown")
        else:
            self.count("404 of a name that was gone")

    def answered(self, answer: Answer, before: Standing) -> None:
        """A choice was answered; `before` is what was known of the name when it was asked."""
        now = self.standing(answer.name)
        if before.state == "gone" and now.turn == before.turn:
            self.fault("answered when gone", answer.name)
        if answer.name == BASE:
            if answer.generation is not None:
                self.fault("generation", f"the base said {answer.generation}")
            self._judge(answer, BASE)
            return
        if answer.generation is None or answer.generation < before.generation:
            self.fault("old version", f"{answer.name}: {answer.generation}, had {before}")
        elif answer.generation < now.generation:
            self.count("kept a version that was replaced meanwhile")
        with self._lock:
            folder = self._folders.get(answer.generation or 0)
            if folder is None:  # its load has not been acknowledged yet
                self._waiting.append(answer)
        if folder is not None:
            self._judge(answer, folder)

    def settle(self) -> None:
        """Judge the answers that came before their load's acknowledgement."""
        waiting, self._waiting = self._waiting, []
        for answer in waiting:
            folder = self._folders.get(answer.generation or 0)
            if folder is None:
                self.fault("generation", f"{answer.name}: nobody loaded {answer.generation}")
            else:
                self._judge(answer, folder)

    def _judge(self, answer: Answer, folder: str) -> None:
        said = self.library.said[folder, answer.question]
        own = folder == answer.name or folder.startswith(f"{answer.name}-")
        if own and (said == answer.text if answer.whole else said.startswith(answer.text)):
            self.count("answers checked, whole" if answer.whole else "answers checked, cancelled")
            return
        other = self._texts.get(answer.text, "nobody") if answer.whole else "?"
        self.fault("wrong answer", f"{folder}: {answer.text!r}, not {said!r}; it is {other}'s")

    def reply_failed(self, what: str, status: int, headers: Any, text: str) -> None:
        """A reply that is neither an answer nor a refusal that was asked for."""
        if status == 503 and int(headers.get("Retry-After") or 0) >= 1:
            self.count("503 with Retry-After")
        else:
            self.fault("crash or 5xx" if status >= 500 else "refused", f"{what}: {status} {text}")
