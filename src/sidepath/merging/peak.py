"""The most memory that this process had resident, from a moment on (floor 5)."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

_PROCESS = Path("/proc/self")


def reset_peak() -> None:
    """Forget the peak so far, where the system can (Linux); else it stays the process's."""
    with suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")


def peak_bytes() -> int | None:
    """Most bytes resident since `reset_peak`, pages of mapped files included; None if unknown."""
    with suppress(OSError):
        for line in (_PROCESS / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None
