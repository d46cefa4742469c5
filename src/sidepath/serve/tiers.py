"""Where adapters are kept: on the model, in host memory, on disk, on the hub (floor 5).

An adapter that is asked for is brought to the model by a thread of its own: out of host memory, or
off the disk (from the hub first, if it is named so). What is over a tier's bytes goes down again,
the least recently asked for first: from the model to host memory, from there to nothing, since the
disk has it. Files are read, not mapped: the bytes that were checked are the bytes that answer,
whatever becomes of the file.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from sidepath.core.laid_out import renew
from sidepath.errors import ConfigError, ServeError, StoreError
from sidepath.injection.merging import merge, unmerge
from sidepath.injection.registry import Installed, require_registry
from sidepath.injection.surgery import remove
from sidepath.serve.reading import Checked
from sidepath.serve.versions import Version

Rank = Callable[[Version, Version], tuple[int, ...] | None]
"""Whether one may leave the model for another, and who does first: the least. None: may not."""


@dataclass(frozen=True)
class Memory:
    """Bytes of adapters. Errors: `ConfigError` that names every impossible one."""

    resident: int = 2**30
    """Of those on the model. The factors of the rows that run are stacked beside (`Runner`)."""
    host: int = 2**30
    """Of those that left it and can come back without being read."""
    reading: int = 4
    """Adapters on their way at once."""

    def __post_init__(self) -> None:
        least = {"resident": 1, "host": 0, "reading": 1}
        faults = [
            f"{name} is {vars(self)[name]}, and must be at least {most}"
            for name, most in least.items()
            if vars(self)[name] < most
        ]
        if faults:
            raise ConfigError("no adapter can be kept like this", faults=faults)


class Host:
    """Adapters in host memory, the longest unused dropped first. Safe for several threads."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._lock = threading.Lock()
        self._kept: OrderedDict[Version, Checked] = OrderedDict()

    @property
    def bytes(self) -> int:
        with self._lock:
            return self._bytes()

    def keep(self, version: Version, checked: Checked) -> None:
        """Keep an adapter as the one used last, if the budget and what is pinned allow."""
        with self._lock:
            self._kept[version] = checked
            self._kept.move_to_end(version)
            for other in [each for each in self._kept if not each.pinned]:
                if self._bytes() <= self.budget:
                    return
                del self._kept[other]

    def get(self, version: Version) -> Checked | None:
        """What is kept of an adapter."""
        with self._lock:
            return self._kept.get(version)

    def drop(self, version: Version) -> None:
        """Forget an adapter."""
        with self._lock:
            self._kept.pop(version, None)

    def __contains__(self, version: Version) -> bool:
        return self.get(version) is not None

    def _bytes(self) -> int:
        return sum(checked.size for checked in self._kept.values())


class Tiers:
    """The adapters on a model, and those beside it. Everything here is done between two steps,
    by whoever may change the model then.
    """

    def __init__(
        self, model: nn.Module, memory: Memory, forget: Callable[[str], None], merged: bool
    ) -> None:
        self._model, self.memory, self._forget = model, memory, forget
        self.merged = merged
        """Whether the one adapter on the model is folded into its weights."""
        self.host = Host(memory.host)
        self._resident: dict[Version, Checked | None] = {}
        """With what is in host memory of it without taking any of its own."""
        self.coming: dict[Version, list[Version]] = {}
        """Those on their way, each with those that have to leave for it."""
        self.loads = self.evictions = self.reads = 0
        """Adapters that came to the model, that made room for others, that were read from disk."""

    @property
    def bytes(self) -> int:
        """Bytes of the adapters on the model."""
        return sum(version.size for version in self.resident())

    def resident(self) -> list[Version]:
        """The adapters on the model."""
        return list(self._resident)

    def promise(self, version: Version, rank: Rank) -> bool:
        """Reserve room for one that is to come; returns whether there is enough. Who has to leave
        for it answers nobody from now on, or it might be asked again before the other has come.

        Errors: `ServeError` for one that never fits.
        """
        self.refuse_large(version)
        promised = {each for leaving in self.coming.values() for each in leaving}
        staying = [each for each in self._resident if each not in promised]
        leaving = self._leaving([*staying, *self.coming], staying, version, rank)
        if leaving is None:
            return False
        self.coming[version] = leaving
        version.standing = "coming"
        for each in leaving:
            each.standing = "leaving"
        return True

    def withdraw(self, version: Version) -> list[Version]:
        """The one that was to come does not, or has: returns who was to leave for it, and may
        answer again.
        """
        version.standing = "away"
        leaving = [each for each in self.coming.pop(version, []) if each in self._resident]
        for each in leaving:
            each.standing = "here"
        return leaving

    def _leaving(
        self, counted: Sequence[Version], may: Sequence[Version], version: Version, rank: Rank
    ) -> list[Version] | None:
        """Who of some has to leave so that one more has room beside those that count; None if not
        enough of them may.
        """
        over = sum(each.size for each in counted) + version.size - self.memory.resident
        if self.merged:  # one at a time
            over = len(counted)
        free = [each for each in may if not each.pinned or self.merged]
        ranked = [(found, each) for each in free if (found := rank(each, version)) is not None]
        leaving: list[Version] = []
        for _, each in sorted(ranked, key=lambda pair: pair[0]):
            if over <= 0:
                break
            leaving.append(each)
            over -= 1 if self.merged else each.size
        return leaving if over <= 0 else None

    def refuse_large(self, version: Version) -> None:
        """Raise `ServeError` for one that has no room beside what is pinned, whoever leaves."""
        pinned = sum(each.size for each in self._resident if each.pinned and each is not version)
        if version.size + pinned > self.memory.resident:
            raise too_large(version, self.memory.resident, pinned)

    def place(self, version: Version, checked: Checked, rank: Rank) -> bool:
        """Put an adapter on the model, and whoever has to leave for it beside; it is only kept in
        host memory (False) where not enough may leave.

        Errors: `StoreError` for another adapter than the version was; those of `stand_up`.
        """
        _refuse_other(version, checked)
        version.size = version.size or checked.size
        self.refuse_large(version)
        leaving = self.withdraw(version)
        counted = [each for each in self._resident if each not in leaving]
        may = [each for each in counted if each.standing == "here"]
        more = self._leaving(counted, may, version, rank)
        if more is None:
            self.host.keep(version, checked)
            return False
        installed = self._changed([*leaving, *more], version.internal, checked)
        version.digest, version.config = checked.digest, checked.config
        version.labels = checked.labels
        version.size = sum(parameter.nbytes for parameter in installed.parameters())
        shared = _shares(installed, checked)
        self._resident[version] = checked if shared else None
        if shared:
            self.host.drop(version)
        else:
            self.host.keep(version, checked)
        version.standing = "here"
        self.loads += 1
        return True

    def _changed(self, leaving: list[Version], internal: str, checked: Checked) -> Installed:
        """The model with others taken off and one put on; merged, if that is how it is served."""
        self.evictions += len(leaving)
        if not self.merged:
            for each in leaving:
                self.take_off(each)
            return checked.stand_up(self._model, internal)
        if leaving:  # the base's own tensors come back; the memory of the merged ones is kept
            unmerge(self._model, keep=True)
            renew(self._model)
        try:
            installed = checked.stand_up(self._model, internal)
        finally:
            for each in leaving:
                self.take_off(each)
        try:
            merge(self._model, internal)
            renew(self._model)
        except BaseException:
            remove(self._model, internal)
            raise
        return installed

    def take_off(self, version: Version, *, keep: bool = True) -> None:
        """Take an adapter off the model; with `keep` it goes to host memory."""
        self._forget(version.internal)
        checked = self._resident.pop(version)
        registry = require_registry(self._model)
        if registry.merged == version.internal:
            unmerge(self._model)
            renew(self._model)
        remove(self._model, version.internal)
        version.standing = "away"
        if not keep:
            self.host.drop(version)
        elif checked is not None:
            self.host.keep(version, checked)

    def drop(self, version: Version) -> None:
        """Forget an adapter altogether."""
        if version in self._resident:
            self.take_off(version, keep=False)
        self.host.drop(version)


def _shares(installed: Installed, checked: Checked) -> bool:
    """Whether what was read is the adapter's own memory, so that keeping it takes none."""
    own = {parameter.untyped_storage().data_ptr() for parameter in installed.parameters()}
    tensors: Iterable[int] = (
        tensor.untyped_storage().data_ptr()
        for of_place in checked.tensors.values()
        for tensor in of_place.values()
    )
    return own.issuperset(tensors)


def _refuse_other(version: Version, checked: Checked) -> None:
    digest, config = version.digest, version.config
    if (digest is None or digest == checked.digest) and (
        config is None or config == checked.config
    ):
        return
    raise StoreError(
        f'the folder of "{version.name}" holds another adapter than it did',
        where=version.source,
        found=checked.digest,
        expected=digest,
        hint="load it anew under its name: requests that were begun keep the old one",
    )


def too_large(version: Version, budget: int, pinned: int) -> ServeError:
    """The error for an adapter that cannot be on the model beside what is pinned there."""
    beside = f" beside {pinned:,} that are pinned" if pinned else ""
    return ServeError(
        f'"{version.name}" has no room on the model',
        found=f"{version.size:,} bytes{beside}",
        expected=f"at most {budget:,} in all",
        hint="raise --adapter-memory, or unpin an adapter",
    )
