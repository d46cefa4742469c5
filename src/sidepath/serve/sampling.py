"""The next token of each row, by each row's own settings (floor 5).

All rows are worked on at once; what one row gets depends on its own logits, settings, seed and
tokens alone. The settings mean what they mean in `transformers`, and act in its order: repetition
penalty (Keskar et al., 2019), temperature, top-k, top-p (Holtzman et al., 2020), min-p (Nguyen et
al., 2024). The random number of a row's n-th token is a hash of its seed and n
(`kernels/hashed.py`), not the next one of a stream.

Dimensions: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sidepath.errors import RequestRefused
from sidepath.kernels.hashed import bits

MOST_LOGPROBS = 20


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen. Errors: `RequestRefused` that names every bad field."""

    temperature: float = 0.0
    """Divides the logits; 0: the likeliest token, always."""
    top_k: int = 0
    """Only the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens whose probabilities together reach p."""
    min_p: float = 0.0
    """Only tokens at least min_p times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens seen before, in prompt or answer, and multiplies negative
    ones."""
    seed: int = 0
    """Same seed, same tokens, whatever else is in the batch."""
    logprobs: int | None = None
    """How many of the likeliest tokens are reported with each token; None: no log-probabilities."""

    def __post_init__(self) -> None:
        faults = [
            f"{name} is {vars(self)[name]}, and must be {must}"
            for name, (holds, must) in _FIELDS.items()
            if not holds(vars(self)[name])
        ]
        if faults:
            raise RequestRefused("tokens cannot be chosen like this", faults=faults)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


_FIELDS: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda t: t == 0 or 1e-3 <= t <= 100, "0, or from 0.001 to 100"),
    "top_k": (lambda k: k >= 0, "0 or more"),
    "top_p": (lambda p: 0 < p <= 1, "above 0 and at most 1"),
    "min_p": (lambda p: 0 <= p <= 1, "from 0 to 1"),
    "repetition_penalty": (lambda p: 1e-3 <= p <= 1e3, "from 0.001 to 1000"),
    "seed": (lambda s: 0 <= s < 2**64, "from 0 to 2^64 - 1"),
    "logprobs": (
        lambda n: n is None or 0 <= n <= MOST_LOGPROBS,
        f"from 0 to {MOST_LOGPROBS}",
    ),
}


@dataclass(frozen=True)
class Turn:
    """A row whose next token is due."""

    sampling: Sampling
    tokens: Sequence[int]
    """Its tokens so far, prompt and answer."""
    number: int
    """How many of them are the answer's."""
    allowed: Callable[[int], Tensor] | None = None
    """Of a vocabulary's size: which tokens may come (V,); None: all."""


@dataclass(frozen=True)
class Chosen:
    """A row's next token."""

    token: int
    logprob: float | None = None
    """Its log-probability as the model gave it, before any setting acted; if asked for."""
    likeliest: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with theirs, likeliest first."""


@torch.no_grad()
def choose(logits_BV: Tensor, turns: Sequence[Turn]) -> list[Chosen | None]:
    """The next token of each row; None for a row whose logits are not numbers. On the CPU."""
    logits_BV = logits_BV.float().cpu()
    sound_B = torch.isfinite(logits_BV.amax(dim=1))  # NaN and Inf come through; -Inf need not
    scores_BV = torch.where(sound_B[:, None], logits_BV, 0.0)
    raw_BV = scores_BV
    scores_BV = _allowed(_penalised(scores_BV, turns), turns)
    tokens_B = scores_BV.argmax(dim=1)
    drawn = [row for row, turn in enumerate(turns) if not turn.sampling.greedy]
    if drawn:
        own = [turns[row] for row in drawn]
        tokens_B[torch.tensor(drawn)] = _drawn(scores_BV[torch.tensor(drawn)], own)
    found: list[Chosen | None] = [Chosen(token) for token in tokens_B.tolist()]
    for row, turn in enumerate(turns):
        if turn.sampling.logprobs is not None:
            found[row] = _reported(raw_BV[row], int(tokens_B[row]), turn.sampling.logprobs)
    return [each if sound else None for each, sound in zip(found, sound_B.tolist(), strict=True)]


def _reported(logits_V: Tensor, token: int, count: int) -> Chosen:
    logprobs_V = logits_V.log_softmax(dim=0)
    best = logprobs_V.topk(min(count, len(logprobs_V)))
    likeliest = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Chosen(token, float(logprobs_V[token]), likeliest)


def _allowed(scores_BV: Tensor, turns: Sequence[Turn]) -> Tensor:
    rows = [row for row, turn in enumerate(turns) if turn.allowed is not None]
    if not rows:
        return scores_BV
    scores_BV = scores_BV.clone()
    for row in rows:
        allowed = turns[row].allowed
        assert allowed is not None
        scores_BV[row, ~allowed(scores_BV.shape[1])] = -math.inf
    return scores_BV


def _penalised(scores_BV: Tensor, turns: Sequence[Turn]) -> Tensor:
    penalties = [turn.sampling.repetition_penalty for turn in turns]
    rows = [row for row, penalty in enumerate(penalties) if penalty != 1.0]
    if not rows:
        return scores_BV
    scores_BV = scores_BV.clone()
    for row in rows:
        seen = torch.tensor(sorted(set(turns[row].tokens)))
        scores = scores_BV[row, seen]
        penalty = penalties[row]
        scores_BV[row, seen] = torch.where(scores < 0, scores * penalty, scores / penalty)
    return scores_BV


def _drawn(scores_BV: Tensor, turns: Sequence[Turn]) -> Tensor:
    """A token of each row (B,), drawn from what its settings leave."""
    settings = [turn.sampling for turn in turns]
    scores_BV = scores_BV / torch.tensor([each.temperature for each in settings])[:, None]
    probabilities_BV = _left(scores_BV, settings).softmax(dim=1, dtype=torch.float64)
    up_to_BV = probabilities_BV.cumsum(dim=1)
    uniform_B = torch.tensor(
        [uniform(t.sampling.seed, t.number) for t in turns], dtype=torch.float64
    )
    # The first token whose sum is above: never one of probability 0, since u < 1.
    return torch.searchsorted(up_to_BV, (uniform_B * up_to_BV[:, -1])[:, None], right=True)[:, 0]


def uniform(seed: int, number: int) -> float:
    """The random number in [0, 1) of a request's n-th token: 52 bits, a function of both alone."""
    high, low = map(int, bits(seed, 2 * number, 2).tolist())
    return ((high & 0x7FFFFFFF) * 2**21 + ((low & 0x7FFFFFFF) >> 10)) / 2.0**52


def _left(scores_BV: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """The scores with minus infinity where a row's settings leave nothing."""
    vocabulary = scores_BV.shape[1]
    if any(0 < each.top_k < vocabulary or each.top_p < 1 for each in settings):
        k_B = torch.tensor([min(each.top_k or vocabulary, vocabulary) for each in settings])
        sorted_BV = scores_BV.sort(dim=1, descending=True).values
        kth_B1 = sorted_BV.gather(1, k_B[:, None] - 1)
        scores_BV = scores_BV.masked_fill(scores_BV < kth_B1, -math.inf)
        scores_BV = _nucleus(scores_BV, torch.tensor([each.top_p for each in settings]))
    if any(each.min_p > 0 for each in settings):
        min_B = torch.tensor([each.min_p for each in settings])
        probabilities_BV = scores_BV.softmax(dim=1)
        floor_B1 = min_B[:, None] * probabilities_BV.amax(dim=1, keepdim=True)
        scores_BV = scores_BV.masked_fill(probabilities_BV < floor_B1, -math.inf)
    return scores_BV


def _nucleus(scores_BV: Tensor, p_B: Tensor) -> Tensor:
    """Drop the unlikeliest tokens that together have no more than 1 - p; one always stays."""
    order = scores_BV.sort(dim=1)
    together_BV = order.values.softmax(dim=1).cumsum(dim=1)
    dropped_BV = together_BV <= (1 - p_B)[:, None]
    dropped_BV[:, -1] = False
    dropped_BV[p_B >= 1] = False
    return scores_BV.masked_fill(dropped_BV.scatter(1, order.indices, dropped_BV), -math.inf)
