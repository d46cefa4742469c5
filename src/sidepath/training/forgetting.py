"""What an adapter makes its base forget: the loss of the base's own text, before and after.

Dimensions: B rows, T tokens, N predicted tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sidepath.data.dataset import Data
from sidepath.errors import DataError, UnknownAdapter
from sidepath.injection.registry import require_registry
from sidepath.injection.surgery import disabled, refuse_merged
from sidepath.training.evaluate import end_tokens
from sidepath.training.loss import accepted
from sidepath.training.trained import context_of, device_of, modes_kept, require_fit

SAMPLED = "sampled from the base"
_ROWS_AT_ONCE = 4
"""Rows of one forward pass: V can be 150,000, and the logits are float32."""

Row = tuple[list[int], list[bool]]
"""Token ids, and which of them are predicted (the first never is)."""


@dataclass(frozen=True)
class Forgetting:
    """Losses in nats a token, without the adapter and with it."""

    before: float
    """Mean loss of the base alone."""
    after: float
    """Mean loss of the base with the adapter."""
    error: float
    """Standard error of the difference, from its spread over the rows; NaN for one row."""
    tokens: int
    """Predicted tokens that the means are over."""
    source: str
    """Whose text it is: `SAMPLED`, or the name of the data."""

    @classmethod
    def of(
        cls, before: Sequence[float], after: Sequence[float], counts: Sequence[int], source: str
    ) -> Forgetting:
        """From the summed losses of each row, and the predicted tokens it has."""
        total = sum(counts)
        return cls(
            before=math.fsum(before) / total,
            after=math.fsum(after) / total,
            error=_error([b - a for a, b in zip(before, after, strict=True)], counts),
            tokens=total,
            source=source,
        )

    @property
    def difference(self) -> float:
        """What was forgotten, in nats a token. On text sampled from the base it estimates
        KL(base || adapted) a token, which is never negative; the estimate can be, by chance.
        """
        return self.after - self.before

    def as_dict(self) -> dict[str, Any]:
        """The `forgetting` of a JSON document; an unknown error is null."""
        error = self.error if math.isfinite(self.error) else None
        return {**asdict(self), "error": error, "difference": self.difference}


def forgetting(
    model: nn.Module,
    tokenizer: Any,
    *,
    adapter: str | None = None,
    data: Data | None = None,
    rows: int = 16,
    tokens: int = 64,
    seed: int = 0,
) -> Forgetting | None:
    """The loss of the base's own text with `adapter` (the active one by default) and without.

    The text is sampled from the base itself: `rows` rows of at most `tokens` tokens at
    temperature 1 after the begin token, each until its end token. For x ~ base,

        E[log base(x) - log adapted(x)] / E[length] = KL(base || adapted) a token,

    so no data are needed and the same `seed` gives the same figures. With `data` the text is the
    user's: their supervised tokens. None for models that write no text (classifiers, encoders).
    Modes, active adapter and random states are put back.

    Raises:
        UnknownAdapter: no adapter of that name is on the model, or none is active.
        MergeError: an adapter is merged into the base.
        DataError: nothing to start from; data that do not fit, or without a predicted token.
    """
    if not _writes_text(model):
        return None
    with modes_kept(model), torch.no_grad(), _answered_by(model, adapter):
        model.eval()
        with disabled(model):
            if data is None:
                texts = _sampled(model, tokenizer, rows, tokens, seed)
            else:
                texts = _rows_of(model, data)
            before = _losses(model, texts)
        after = _losses(model, texts)
    counts = [sum(predicted) for _, predicted in texts]
    return Forgetting.of(before, after, counts, SAMPLED if data is None else data.name)


def _writes_text(model: Any) -> bool:
    """Whether the model is a decoder that continues text."""
    can = getattr(model, "can_generate", None)
    settings = getattr(model, "config", None)
    return bool(can and can()) and not getattr(settings, "is_encoder_decoder", False)


@contextmanager
def _answered_by(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """One adapter, or the active one, answers every row, whatever the caller routes or silences."""
    registry = require_registry(model)
    refuse_merged(registry, "forgetting cannot be measured")
    routing = registry.routing
    name = routing.active if adapter is None else registry.adapter(adapter).name
    if name is None:
        raise UnknownAdapter("no adapter is active, and none is named")
    kept = routing.active, routing.rows, routing.silent
    routing.active, routing.rows, routing.silent = name, None, False
    try:
        yield
    finally:
        routing.active, routing.rows, routing.silent = kept


def _sampled(model: Any, tokenizer: Any, rows: int, tokens: int, seed: int) -> list[Row]:
    """Rows drawn from the model as it stands, token by token at temperature 1."""
    begin, ends = begin_token(model, tokenizer), end_tokens(model, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    device = device_of(model)
    length = int(min(tokens, context_of(model) - 1))
    if rows < 1 or length < 1:
        raise DataError("no text can be sampled", found=f"{rows} rows of {length} tokens")
    texts = [[begin] for _ in range(rows)]
    open_ = [True] * rows
    ids_BT, cache = torch.full((rows, 1), begin, device=device), None
    for _ in range(length):
        output = model(input_ids=ids_BT, **_cached(model, cache))
        cache = getattr(output, "past_key_values", None)
        chances_BV = output.logits[:, -1].float().softmax(dim=-1).cpu()
        new_B = torch.multinomial(chances_BV, 1, generator=generator)
        for row, token in enumerate(new_B[:, 0].tolist()):
            if open_[row]:
                texts[row].append(token)
                open_[row] = token not in ends
        if not any(open_):
            break
        new_BT = new_B.to(device)
        # Models without a cache of keys and values read the row again.
        ids_BT = new_BT if cache is not None else torch.cat([ids_BT, new_BT], dim=1)
    return [(text, [False] + [True] * (len(text) - 1)) for text in texts]


def _cached(model: Any, cache: Any) -> dict[str, Any]:
    if "past_key_values" not in accepted(type(model).forward):
        return {}
    return {"past_key_values": cache, "use_cache": True}


def begin_token(model: Any, tokenizer: Any) -> int:
    """What a text of the base starts with: the tokenizer's begin token or, where there is none
    (chat models), the config's; else the end token, which separates documents; else a space.
    """
    settings = model.config.get_text_config()
    known = (tokenizer.bos_token_id, settings.bos_token_id, tokenizer.eos_token_id)
    for token in known:
        if isinstance(token, int):
            return token
    space = tokenizer(" ", add_special_tokens=False)["input_ids"]
    if not space:
        raise DataError(
            "the base's own text has nothing to start from",
            found="a tokenizer without a begin token, an end token or a space",
            hint="give the text to measure on: forgetting(..., data=...)",
        )
    return int(space[0])


def _rows_of(model: nn.Module, data: Data) -> list[Row]:
    """The user's rows; one without a predicted token says nothing."""
    require_fit(model, data)
    texts = [
        (example.ids_T.tolist(), [False, *example.supervised_T[1:].tolist()])
        for example in data.examples
    ]
    texts = [text for text in texts if any(text[1])]
    if not texts or data.task != "causal":
        raise DataError(
            "nothing in these data can be predicted",
            where=data.name,
            expected="rows of text for a causal model",
        )
    return texts


def _losses(model: Any, texts: Sequence[Row]) -> list[float]:
    """The summed loss of each row, in nats: float32 softmax, float64 sums."""
    losses: list[float] = []
    for start in range(0, len(texts), _ROWS_AT_ONCE):
        losses += _batch_losses(model, texts[start : start + _ROWS_AT_ONCE]).tolist()
    return losses


def _batch_losses(model: Any, texts: Sequence[Row]) -> Tensor:
    longest = max(len(ids) for ids, _ in texts)
    ids_BT = torch.tensor([ids + [ids[0]] * (longest - len(ids)) for ids, _ in texts])
    mask_BT = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in texts])
    wanted_BT = torch.tensor([p + [False] * (longest - len(p)) for _, p in texts])[:, 1:]
    device = device_of(model)
    logits_BTV = model(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device)).logits
    wanted_BT = wanted_BT.to(device)
    logits_NV = logits_BTV[:, :-1][wanted_BT].float()
    targets_N = ids_BT.to(device)[:, 1:][wanted_BT]
    losses_N = functional.cross_entropy(logits_NV, targets_N, reduction="none").double()
    rows_N = wanted_BT.nonzero()[:, 0]
    return losses_N.new_zeros(len(texts)).index_add_(0, rows_N, losses_N)


def _error(differences: Sequence[float], counts: Sequence[int]) -> float:
    """Standard error of sum(differences) / sum(counts), a ratio of two means over the rows."""
    rows = len(counts)
    if rows < 2:
        return math.nan
    ratio = math.fsum(differences) / sum(counts)
    spread = math.fsum((d - ratio * n) ** 2 for d, n in zip(differences, counts, strict=True))
    return math.sqrt(spread * rows / (rows - 1)) / sum(counts)
