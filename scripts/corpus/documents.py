"""The mixture: which kinds of document the corpus holds, and how much of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random

from . import copying, everyday, opinions, records, statements

# Weights are shares of documents.  Copying and records lead, because looking back in the
# text is the skill that an adapter can later aim at a new format.
FIRST = (
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


# The second, shorter stage.  Whether a word praises or blames is said by one token among
# thirty in the first stage and was not learnt there; here verdicts are dense.  The rest keeps
# what was learnt before.
SECOND = (
    (opinions.verdicts, 30),
    (opinions.sorted_words, 8),
    (opinions.review, 8),
    (opinions.word_notes, 2),
    *((maker, weight / 3) for maker, weight in FIRST if maker is not opinions.review),
)
Mixture = Sequence[tuple[Callable[[Random], str], float]]


def documents(seed: int, mixture: Mixture = FIRST) -> Iterator[str]:
    """An endless stream of documents; the same seed always gives the same stream."""
    rng = Random(seed)
    makers = [maker for maker, _ in mixture]
    weights = [weight for _, weight in mixture]
    while True:
        yield rng.choices(makers, weights)[0](rng)
