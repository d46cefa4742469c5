from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np

from sidepath.data.dataset import load_data
from sidepath.data.survey import fingerprint_of, groups, survey


def test_groups_are_numbered_by_first_appearance() -> None:
    """Against a dictionary, with digests that end or begin with zeros."""
    draws = random.Random(3)
    known = [bytes(16), bytes(15) + b"\x01", b"\x01" + bytes(15)]
    known += [draws.randbytes(16) for _ in range(20)]
    rows = [draws.choice(known) for _ in range(500)]
    numbers: dict[bytes, int] = {}
    expected = [numbers.setdefault(row, len(numbers)) for row in rows]
    assert groups(b"".join(rows)).tolist() == expected
    assert groups(b"").tolist() == []


def test_figures_against_plain_counting(tokenizer: Any) -> None:
    rows = [
        {"prompt": "p" * (at % 5), "completion": "xyz"[: at % 3 + 1] * (at % 7)} for at in range(60)
    ]
    examples = load_data(rows, tokenizer, max_tokens=14).examples
    found = survey(examples, "heading")
    assert found.tokens == sum(len(example.ids_T) for example in examples)
    assert found.supervised == sum(
        example.supervised_T.tolist().count(True) for example in examples
    )
    assert found.longest == max(len(example.ids_T) for example in examples)
    assert found.largest_id == max(max(example.ids_T.tolist()) for example in examples)
    assert found.ends == len(examples)
    assert found.truncated == sum(example.truncated for example in examples)
    different = {(tuple(e.ids_T.tolist()), tuple(e.supervised_T.tolist())) for e in examples}
    assert found.duplicates == len(examples) - len(different) > 0
    whole = hashlib.sha256(b"heading")
    for example in examples:
        whole.update(fingerprint_of(example))
    assert found.digest == whole.hexdigest()


def test_labels_count_and_tell_rows_apart(tokenizer: Any) -> None:
    rows = [{"text": "a", "label": label} for label in ("x", "y", "x")]
    found = survey(load_data(rows, tokenizer).examples, "")
    assert (found.labels[0], found.labels[1], found.duplicates) == (2, 1, 1)
    assert survey([], "").tokens == survey([], "").duplicates == 0
    assert np.array_equal(groups(bytes(32)), [0, 0])
