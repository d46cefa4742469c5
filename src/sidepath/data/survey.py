"""One pass over the examples: everything that is counted of them, and their digest.

Held per row: 16 bytes (to find duplicates) and nothing else, so that examples on disk stay there.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sidepath.data.example import Example


@dataclass(frozen=True)
class Survey:
    """Figures of examples."""

    digest: str
    """SHA-256 of a heading and of everything training sees of the rows, in order."""
    tokens: int
    supervised: int
    ends: int
    truncated: int
    longest: int
    largest_id: int
    duplicates: int
    """Rows equal to an earlier one, token for token, mask and label included."""
    labels: Counter[int]
    """Rows of each class id."""


def survey(examples: Iterable[Example], heading: str) -> Survey:
    """Go through the examples once; `heading` is what else the digest is to depend on."""
    whole = hashlib.sha256(heading.encode())
    seen = bytearray()
    tokens = supervised = ends = truncated = longest = largest = 0
    labels: Counter[int] = Counter()
    for example in examples:
        fingerprint = fingerprint_of(example)
        whole.update(fingerprint)
        seen += fingerprint[:16]
        tokens += len(example.ids_T)
        supervised += int(np.count_nonzero(example.supervised_T))
        ends += example.ends
        truncated += example.truncated
        longest = max(longest, len(example.ids_T))
        largest = max(largest, int(example.ids_T.max(initial=0)))
        if example.label is not None:
            labels[example.label] += 1
    return Survey(
        digest=whole.hexdigest(),
        tokens=tokens,
        supervised=supervised,
        ends=ends,
        truncated=truncated,
        longest=longest,
        largest_id=largest,
        duplicates=len(seen) // 16 - int(groups(seen).max(initial=-1)) - 1,
        labels=labels,
    )


def fingerprint_of(example: Example) -> bytes:
    """SHA-256 of what training sees of one example."""
    digest = hashlib.sha256(example.ids_T.tobytes())
    digest.update(example.supervised_T.tobytes())
    digest.update(str(example.label).encode())
    return digest.digest()


def groups(digests: bytes | bytearray) -> NDArray[np.int64]:
    """For each 16-byte digest the number of its group of equal ones, by first appearance."""
    pairs = np.frombuffer(bytes(digests), dtype=[("high", np.uint64), ("low", np.uint64)])
    _, first, group = np.unique(pairs, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[group.reshape(-1)]
