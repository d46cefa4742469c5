"""The settings of the verbs push and library (floor 7).

Nothing here may import torch: `sidepath --help` reads these classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sidepath.config import check


@dataclass(frozen=True, kw_only=True)
class PushRun:
    """How `push` uploads an adapter."""

    private: bool = False
    """A repository that is made for it is seen by its owner alone."""
    message: str | None = None
    """The commit's message; the adapter's name and method when not given."""
    licence: str | None = None
    """The adapter's licence by its identifier on the hub, as in `apache-2.0`."""
    parity: str | None = None
    """Folder of this adapter merged into its base: its measured parity goes onto the card."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class LibraryRun:
    """What `library` lists."""

    base: str | None = field(default=None, metadata={"place": "base"})
    """List the adapters of this base alone: its folder, `hub:OWNER/NAME[@REVISION]`, or the
    fingerprint that the list shows."""
    method: str | None = None
    """List the adapters of this method alone."""

    def __post_init__(self) -> None:
        check(self)
