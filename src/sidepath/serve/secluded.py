"""Ray for these processes alone: to be said before Ray is imported, which reads it once (floor 5).

Ray's ports are open on all interfaces, and whoever may use them runs code as this user. So whoever
asks Ray anything needs a token, made anew for each run, which these processes have in their
environments and nobody else. Nothing is told to Ray's makers.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from sidepath.errors import ServeError

_PATIENCE = "120"
"""Seconds for Ray's first process to come up: its own 20 are not enough for a busy machine."""


@contextmanager
def secluded() -> Iterator[None]:
    """Within the block Ray, if it is imported in it, and every process that it starts, ask each
    other for the token.
    """
    own = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_NUM_REDIS_GET_RETRIES": _PATIENCE,
    }
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def refuse_open() -> None:
    """Errors: `ServeError` outside of `secluded`."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        raise ServeError("Ray would take orders from everybody", hint="start it within secluded()")
