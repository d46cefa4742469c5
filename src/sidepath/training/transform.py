"""A function of the user's that changes a row each time it is used in training."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

Transform = Callable[[dict[str, Any]], Mapping[str, Any]]
"""Fields of a row -> the fields that are used; may draw from the global random generators."""


def identity_of(transform: Transform | None) -> dict[str, str | None] | None:
    """The qualified name of a transform, and the SHA-256 of its source text where it has one."""
    if transform is None:
        return None
    # An object that can be called, or a partial, is known by its class.
    named: Any = transform if inspect.isroutine(transform) else type(transform)
    try:
        text = inspect.getsource(named)
    except (OSError, TypeError):
        source = None
    else:
        source = hashlib.sha256(text.encode()).hexdigest()
    return {"name": f"{named.__module__}.{named.__qualname__}", "source": source}
