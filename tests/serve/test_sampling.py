"""Sampling against transformers' own processors, one row at a time."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sidepath.errors import RequestRefused
from sidepath.serve.sampling import Sampling, Turn, choose, uniform

VOCABULARY = 17
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 40]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.7]),
    seed=st.integers(0, 2**64 - 1),
)
turns = st.lists(
    st.builds(
        Turn,
        samplings,
        st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6).map(tuple),
        st.integers(0, 5),
    ),
    min_size=1,
    max_size=6,
)


def processed(logits_V: Tensor, turn: Turn) -> Tensor:
    """The scores as transformers' processors leave them."""
    from transformers import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    sampling, ids = turn.sampling, torch.tensor([turn.tokens])
    scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, logits_V[None])
    if not sampling.greedy:
        scores = TemperatureLogitsWarper(sampling.temperature)(ids, scores)
        if sampling.top_k:
            scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
        if sampling.top_p < 1:
            scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
        if sampling.min_p:
            scores = MinPLogitsWarper(sampling.min_p)(ids, scores)
    kept: Tensor = scores[0]
    return kept


def expected(logits_V: Tensor, turn: Turn) -> int:
    """The slow way: walk along the probabilities until the random number is reached."""
    scores = processed(logits_V, turn)
    if turn.sampling.greedy:
        return int(scores.argmax())
    probabilities = scores.double().softmax(dim=0).tolist()
    left = uniform(turn.sampling.seed, turn.number) * math.fsum(probabilities)
    for token, probability in enumerate(probabilities):
        left -= probability
        if left < 0:
            return token
    raise AssertionError("the random number is below 1")


@settings(max_examples=150, deadline=None)
@given(turns, st.integers(0, 1000))
def test_each_row_is_chosen_as_transformers_processors_would(rows: list[Turn], seed: int) -> None:
    logits = torch.randn(len(rows), VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
    found = choose(logits, rows)
    tokens = [-1 if each is None else each.token for each in found]
    assert tokens == [expected(*each) for each in zip(logits, rows, strict=True)]
    for index, turn in enumerate(rows):  # and alone
        alone = choose(logits[index : index + 1], [turn])[0]
        assert alone is not None
        assert alone.token == tokens[index]


def test_tokens_come_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2, 0.0]]).log().expand(500, -1)
    count: Counter[int] = Counter()
    for seed in range(4):
        rows = [Turn(Sampling(temperature=1.0, seed=seed), (0,), number) for number in range(500)]
        count.update(each.token for each in choose(logits, rows) if each is not None)
    shares = [count[token] / 2000 for token in range(4)]
    assert shares == pytest.approx([0.5, 0.3, 0.2, 0.0], abs=0.03)
    assert count[3] == 0


def test_random_numbers_follow_from_seed_and_place() -> None:
    numbers = {uniform(seed, number) for seed in (0, 1, 2**63, 2**64 - 1) for number in range(50)}
    assert len(numbers) == 200
    assert all(0 <= number < 1 for number in numbers)
    assert uniform(5, 3) == uniform(5, 3)


def test_logprobs_are_the_models_own() -> None:
    logits = torch.randn(2, VOCABULARY)
    sampling = Sampling(temperature=0.5, top_k=1, repetition_penalty=2.0, logprobs=3)
    first, second = choose(logits, [Turn(sampling, (1, 2), 0), Turn(Sampling(), (1,), 0)])
    assert first is not None
    assert second is not None
    logprobs = logits[0].log_softmax(0)
    assert first.logprob == pytest.approx(float(logprobs[first.token]))
    assert [token for token, _ in first.likeliest] == logprobs.topk(3).indices.tolist()
    assert (second.logprob, second.likeliest) == (None, ())


def test_rows_without_numbers_are_none_and_the_others_are_not_touched() -> None:
    logits = torch.randn(4, VOCABULARY)
    logits[1, 3], logits[2, 3] = math.nan, math.inf
    logits[3, 3] = -math.inf  # a model may rule a token out
    rows = [Turn(Sampling(temperature=1.0, seed=n), (1,), 0) for n in range(4)]
    found = choose(logits, rows)
    assert [each is None for each in found] == [False, True, True, False]
    assert found[0] == choose(logits[:1], rows[:1])[0]


def test_every_bad_field_is_named() -> None:
    with pytest.raises(RequestRefused) as error:
        Sampling(
            temperature=-1,
            top_k=-1,
            top_p=0,
            min_p=2,
            repetition_penalty=0,
            seed=-1,
            logprobs=21,
        )
    assert len(error.value.faults) == 7
    with pytest.raises(RequestRefused, match="temperature is nan"):
        Sampling(temperature=math.nan)


@pytest.mark.parametrize("penalty", [1e-3, 1e3])
@pytest.mark.parametrize("temperature", [0.0, 1e-3, 100.0])
def test_the_outermost_settings_still_choose_a_token(penalty: float, temperature: float) -> None:
    """Beyond them numbers overflow, and a token that there is not would be chosen."""
    sampling = Sampling(temperature, repetition_penalty=penalty, min_p=0.1, top_p=0.9)
    for scale in (1e-3, 1.0, 1e4):
        logits = torch.linspace(-scale, scale, VOCABULARY)[None]
        (found,) = choose(logits, [Turn(sampling, range(VOCABULARY), 3)])
        assert found is not None
        assert 0 <= found.token < VOCABULARY
    with pytest.raises(RequestRefused, match=r"from 0\.001 to 1000"):
        Sampling(repetition_penalty=penalty**2)
