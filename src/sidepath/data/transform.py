"""A function of the user's that changes a row each time it is used in training."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Transform = Callable[[dict[str, Any]], Mapping[str, Any]]
"""Fields of a row -> the fields that are used; may draw from the global random generators."""


def identity_of(transform: Transform, rows: Iterable[Mapping[str, Any]]) -> dict[str, str | None]:
    """What says whether a transform of these rows is still the same, as plain values.

    Its qualified name, the SHA-256 of its source text (None where Python cannot get it), and
    that of the rows with all their fields, since it may use some that are not tokenised.
    """
    # An object that can be called, or a partial, is known by its class.
    named: Any = transform if inspect.isroutine(transform) else type(transform)
    try:
        text = inspect.getsource(named)
    except (OSError, TypeError):
        source = None
    else:
        source = hashlib.sha256(text.encode()).hexdigest()
    digest = hashlib.sha256()
    for fields in rows:
        digest.update(json.dumps(dict(fields), sort_keys=True, default=repr).encode())
    name = f"{named.__module__}.{named.__qualname__}"
    return {"name": name, "source": source, "rows": digest.hexdigest()}
