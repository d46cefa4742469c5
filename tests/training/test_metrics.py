from __future__ import annotations

import math

import pytest

from sidepath.training import metrics


def test_exact_match_takes_any_reference_and_ignores_outer_space() -> None:
    outputs = [" a b\n", "c", "d"]
    assert metrics.exact_match(outputs, [["x", "a b"], ["C"], ["d "]]) == pytest.approx(2 / 3)


def test_bleu_by_hand() -> None:
    # 4 of 5 unigrams, 2 of 4 bigrams, 1 of 3 trigrams, no 4-gram: smoothed to 1 / (2 * 2).
    score = metrics.bleu(["the cat sat down here"], [["the cat sat on here"]])
    expected = 100 * math.exp(sum(map(math.log, (4 / 5, 2 / 4, 1 / 3, 1 / 4))) / 4)
    assert score == pytest.approx(expected)


def test_bleu_with_different_numbers_of_references() -> None:
    outputs = ["a b c d e", "v w x y z"]
    assert metrics.bleu(outputs, [["q q q q q", outputs[0]], [outputs[1]]]) == pytest.approx(100)
    assert metrics.bleu(outputs, [[outputs[0]], ["q q q q q"]]) < 60


def test_rouge_l_is_the_best_reference() -> None:
    # Longest common subsequence "a c": precision 2/3, recall 2/2.
    assert metrics.rouge_l(["a b c"], [["z", "a c"]]) == pytest.approx(0.8)
    assert metrics.rouge_l(["a b c", "q"], [["a b c"], ["z"]]) == pytest.approx(0.5)


def test_accuracy_and_matthews_by_hand() -> None:
    predicted, expected = [1, 1, 0, 0, 1], [1, 0, 0, 0, 1]
    assert metrics.accuracy(predicted, expected) == 0.8
    tp, tn, fp, fn = 2, 2, 1, 0
    by_hand = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert metrics.matthews(predicted, expected) == pytest.approx(by_hand)
    assert metrics.matthews([1, 1], [0, 1]) == 0.0
