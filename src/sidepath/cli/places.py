"""Names on the hub among a command's places and settings: fetched, and pinned (floor 7).

From here on each is `hub:OWNER/NAME@COMMIT`: whatever else a command does, it reads one state of
the repository, and the settings that are saved with its result name that state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sidepath.cli.output import note
from sidepath.cli.surface import VERBS, Call
from sidepath.store.hub import ADAPTER, BASE, CONFIG, is_hub, pinned

KINDS = {"adapter": ADAPTER, "base": BASE, "config": CONFIG}
"""What a field's metadata says under "place"."""
READ = {
    "ADAPTER": "adapter",
    "BASE": "base",
    "IN": "adapter",
    "MODEL": "config",
    "OTHER": "adapter",
    "TUNED": "base",
}
"""Places of verbs that are read, and as what; others are written, or are no folders."""


def pin(call: Call) -> Call:
    """The command with its names on the hub fetched and pinned; `call.settings` in place.

    Errors: `HubError`.
    """
    call.settings.change_places(_pinned)
    kinds = _kinds(VERBS[call.verb].places, len(call.places))
    places = (
        place if kind is None else _pinned(kind, place)
        for kind, place in zip(kinds, call.places, strict=True)
    )
    return dataclasses.replace(call, places=tuple(places))


def _pinned(kind: str, place: str) -> str:
    if not is_hub(place):
        return place
    found = pinned(place, KINDS[kind])
    if found != place:
        note(f"{place} is {found}")
    return found


def _kinds(names: Sequence[str], count: int) -> list[str | None]:
    """As what each place that was given is read; the one name with dots takes what is left over."""
    kinds: list[str | None] = []
    for name in names:
        times = 1 + max(0, count - len(names)) if name.endswith("...") else 1
        kinds += [READ.get(name.strip("[]."))] * times
    return kinds[:count]
