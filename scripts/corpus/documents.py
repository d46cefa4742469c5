"""The mixture: which kinds of document the corpus holds, and how much of each."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from . import copying, everyday, opinions, records, statements

# Weights are shares of documents.  Copying and records lead, because looking back in the
# text is the skill that an adapter can later aim at a new format.
MIXTURE = (
    (records.record_and_prose, 20),
    (records.prose_and_questions, 10),
    (records.comparison, 6),
    (statements.handbook, 16),
    (statements.rows, 4),
    (opinions.review, 24),
    (opinions.word_notes, 4),
    (copying.said_again, 12),
    (copying.pairs, 14),
    (copying.quoted, 8),
    (copying.where_is, 4),
    (copying.story, 6),
    (copying.sums, 2),
    (copying.talk, 4),
    (everyday.sentences, 10),
)


def documents(seed: int) -> Iterator[str]:
    """An endless stream of documents; the same seed always gives the same stream."""
    rng = Random(seed)
    makers = [maker for maker, _ in MIXTURE]
    weights = [weight for _, weight in MIXTURE]
    while True:
        yield rng.choices(makers, weights)[0](rng)
