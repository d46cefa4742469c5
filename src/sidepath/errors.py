"""Every exception of Sidepath (floor 0).

An error says what failed, where, what was found, what was expected and what to
do next. Faults of one operation are collected and raised once.

    SidepathError                  base of all; exit code 2: the input is wrong
    ├── ConfigError                an unknown or impossible setting
    ├── TargetNotFound             a target pattern matches no module
    ├── UnsupportedModule          a module no side path can stand beside
    ├── AdapterError               adapters on a model
    │   ├── UnknownAdapter         no adapter of that name is loaded
    │   ├── NameTaken              an adapter of that name is loaded already
    │   └── BadName                not [A-Za-z0-9][A-Za-z0-9._-]{0,63}
    ├── MergeError                 merged twice, not merged, refused while merged
    │   └── TiedWeights            folding would rewrite a tensor shared with another module
    ├── RoutingError               rows and adapters do not fit together
    ├── StoreError                 folders on disk
    │   ├── DamagedAdapter         a file of an adapter folder cannot be trusted or read
    │   ├── WrongBase              the adapter belongs to another base
    │   ├── HubError               a repository of the hub cannot be fetched or written
    │   └── WriteFailed            nothing was published: disk full, no permission, ...
    ├── DataError                  a row, a column or a file of the training data
    ├── TrainError                 training cannot go on
    │   ├── NonFinite              a NaN or Inf in loss or gradient
    │   └── Interrupted            exit code 143: stopped on request, to be resumed
    ├── ResumeError                a checkpoint that does not belong to this run
    ├── ServeError                 requests to a running engine
    │   ├── RequestRefused         a request that can never be answered as it stands
    │   │   └── TooLarge           its body is longer than any that is read
    │   ├── NotAllowed             whoever asks may not ask that
    │   │   └── UnknownCaller      no key, or one that was given to nobody
    │   ├── Outdated               what was to be changed has changed since it was looked at
    │   ├── ReplicaLost            the process that answered has ended
    │   └── Overloaded             no room for one request more just now
    │       └── TooOften           no room for one more of this caller
    ├── MissingExtra               an optional dependency is not installed
    └── ParityError                exit code 1: merged and un-merged model disagree

Two warnings stand beside them:

    SidepathNotice                 something to know that is no error
    KernelNotice                   a fast kernel failed or was wrong: the plain path is used
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import ClassVar


class SidepathError(Exception):
    """What failed; optionally where, what was found and expected, and what to do next.

    `faults` lists every single fault when an operation checked several things.
    """

    exit_code: ClassVar[int] = 2

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        found: object = None,
        expected: object = None,
        hint: str | None = None,
        faults: Sequence[str] = (),
    ) -> None:
        self.what = what
        self.where = where
        self.found = found
        self.expected = expected
        self.hint = hint
        self.faults = list(faults)
        super().__init__(self._text())

    def _text(self) -> str:
        lines = [self.what]
        parts = (("where", self.where), ("found", self.found), ("expected", self.expected))
        lines += [f"  {label}: {value}" for label, value in parts if value is not None]
        shown = self.faults[:20]
        lines += [f"  - {fault}" for fault in shown]
        if len(self.faults) > len(shown):
            lines.append(f"  - and {len(self.faults) - len(shown)} more")
        if self.hint is not None:
            lines.append(f"  next: {self.hint}")
        return "\n".join(lines)


class ConfigError(SidepathError):
    """A setting is unknown, of the wrong type, or impossible."""


class TargetNotFound(SidepathError):
    """A target pattern matches none of the model's modules."""


class UnsupportedModule(SidepathError):
    """A module is targeted that no side path can stand beside."""


class AdapterError(SidepathError):
    """Something is wrong with the adapters a model holds."""


class UnknownAdapter(AdapterError):
    """No adapter of that name is loaded on the model."""


class NameTaken(AdapterError):
    """An adapter of that name is on the model already."""


class BadName(AdapterError):
    """The name does not match `[A-Za-z0-9][A-Za-z0-9._-]{0,63}`."""


class MergeError(SidepathError):
    """A merge or unmerge that does not fit the model's state."""


class TiedWeights(MergeError):
    """Folding would rewrite a tensor that another module shares."""


class RoutingError(SidepathError):
    """The rows of a batch and the adapters they are routed to do not fit."""


class StoreError(SidepathError):
    """A folder on disk cannot be read or written as asked."""


class DamagedAdapter(StoreError):
    """A file of an adapter folder is truncated, altered, malformed or beyond a limit."""


class WrongBase(StoreError):
    """The adapter was made for another base than the one at hand."""


class HubError(StoreError):
    """A repository of the hub is missing, closed, not reached, or not what was asked for."""


class WriteFailed(StoreError):
    """Writing failed; nothing was published and nothing half-written is left."""


class DataError(SidepathError):
    """The training or evaluation data cannot be used as they are."""


class TrainError(SidepathError):
    """Training cannot start or go on."""


class NonFinite(TrainError):
    """A NaN or Inf appeared in the loss or a gradient."""


class Interrupted(TrainError):
    """Training was asked to stop (SIGTERM); a checkpoint holds what was done."""

    exit_code: ClassVar[int] = 143


class ResumeError(SidepathError):
    """A checkpoint is damaged or belongs to a run with other settings."""


class ServeError(SidepathError):
    """A request to a running engine was not answered."""


class RequestRefused(ServeError):
    """A request can never be answered as it stands: nothing of it was begun."""


class TooLarge(RequestRefused):
    """The body of a request is longer than any that is read."""


class NotAllowed(ServeError):
    """Whoever asks may not ask that, however it is put."""


class UnknownCaller(NotAllowed):
    """The caller gave no key, or one that was given to nobody."""


class Outdated(ServeError):
    """What was to be changed is not what it was when it was looked at; nothing has changed."""


class ReplicaLost(ServeError):
    """The process that was to answer has ended before it had."""


class Overloaded(ServeError):
    """There is no room for one request more just now; the same may be asked again later."""

    after: float = 1.0
    """Seconds after which asking again may be worth it."""


class TooOften(Overloaded):
    """A caller asks more often, or for more at once, than it may."""

    def __init__(self, what: str, *, after: float = 1.0, hint: str | None = None) -> None:
        super().__init__(what, hint=hint)
        self.after = after


class MissingExtra(SidepathError):
    """An optional dependency is needed and not installed."""


class ParityError(SidepathError):
    """The merged model does not give the un-merged model's outputs."""

    exit_code: ClassVar[int] = 1


class SidepathNotice(UserWarning):
    """Something to know that is no error, said once by the operation that found it."""


class KernelNotice(UserWarning):
    """A fast kernel will not be used in this process; results are right, and slower to come."""


def closest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names nearest to `name`, best first; empty when none is near."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.6)


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """`closest` as a message shows it: `"a", "b"`."""
    return ", ".join(f'"{match}"' for match in closest(name, known, count))


def meant(name: str, known: Iterable[str]) -> str | None:
    """A hint, `did you mean "a", "b"?`; None when no known name is near."""
    close = nearest(name, known)
    return f"did you mean {close}?" if close else None


def guessed(fault: str, name: str, known: Iterable[str]) -> str:
    """A fault about `name`, and behind a colon what may have been meant by it."""
    hint = meant(name, known)
    return f"{fault}: {hint}" if hint else fault


def in_one_line(said: object) -> str:
    """What an error says over several lines, in one."""
    return "; ".join(" ".join(line.split()) for line in str(said).splitlines() if line.strip())
