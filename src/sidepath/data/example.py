"""One row as training sees it: token ids, and which of them are targets.

Dimensions: T tokens of the row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Example:
    """One row as tokens."""

    ids_T: NDArray[np.int64]
    """Token ids."""
    supervised_T: NDArray[np.bool_]
    """Which tokens are targets; all False for classification."""
    line: int
    """Where the row stands in its source."""
    prompt_length: int = 0
    """Tokens before the last completion: what generation starts from."""
    reference: str | None = None
    """The last completion as text; None where there is nothing to compare with."""
    label: int | None = None
    """Class id, for classification."""
    truncated: bool = False
    """The row was cut to `max_tokens`."""
    ends: bool = False
    """The row's last target is an end token."""
