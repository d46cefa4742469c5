"""Metrics by their published definitions: sacrebleu, rouge-score, scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

References = Sequence[Sequence[str]]
"""The references of each output; outputs may have different numbers of them."""

LOWER_IS_BETTER = ("loss", "perplexity")
"""Metrics of which less is more; of all others more is."""


def exact_match(outputs: Sequence[str], references: References) -> float:
    """Share of outputs equal to one of their references, white space at the ends apart, 0-1."""
    hits = sum(
        output.strip() in {reference.strip() for reference in own}
        for output, own in zip(outputs, references, strict=True)
    )
    return hits / len(outputs)


def bleu(outputs: Sequence[str], references: References) -> float:
    """Corpus BLEU with sacrebleu's defaults (13a, exponential smoothing), 0-100."""
    from sacrebleu.metrics import BLEU

    streams = [list(stream) for stream in zip_longest(*references)]
    return float(BLEU().corpus_score(list(outputs), streams).score)


def rouge_l(outputs: Sequence[str], references: References) -> float:
    """Mean over outputs of the best ROUGE-L F1 against a reference, 0-1 (with stemming)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = [
        scorer.score_multi(list(own), output)["rougeL"].fmeasure
        for output, own in zip(outputs, references, strict=True)
    ]
    return float(sum(scores) / len(scores))


def accuracy(predicted: Sequence[int], expected: Sequence[int]) -> float:
    """Share of equal ids, 0-1."""
    hits = sum(one == other for one, other in zip(predicted, expected, strict=True))
    return hits / len(expected)


def matthews(predicted: Sequence[int], expected: Sequence[int]) -> float:
    """Matthews' correlation coefficient, -1 to 1; 0 when one side has a single class."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(expected, predicted))
